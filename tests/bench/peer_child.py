"""Run by a Python that has MaxText: its own training program, with a clock read when each step is done.

The first argument names the file for what was found: CPU-seconds of each step but the first two, and of the process when the
first was done. The others are MaxText's own settings.
"""

from __future__ import annotations

import itertools
import json
import resource
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import maxtext.common.metric_logger as logger  # pyright: ignore[reportMissingImports]


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


done: list[float] = []
record = logger.MetricLogger.record_train_metrics


def timed(self: Any, metrics: Any, *others: Any) -> Any:
    jax.block_until_ready(metrics)
    done.append(cpu_seconds())
    return record(self, metrics, *others)


logger.MetricLogger.record_train_metrics = timed
package = find_spec("maxtext")
assert package is not None and package.origin is not None
output = Path(sys.argv[1])
sys.argv[1:2] = [str(Path(package.origin).parent / "configs" / "base.yml")]
try:
    runpy.run_module("maxtext.trainers.pre_train.train", run_name="__main__", alter_sys=True)
except SystemExit as end:  # absl's way to end a program
    if end.code:
        raise
steps = [after - before for before, after in itertools.pairwise(done)]
output.write_text(json.dumps({"first": done[0], "steps": steps[1:]}))
