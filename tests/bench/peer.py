"""The same work by MaxText and by this trainer, in turns: CPU-seconds of a step, and from the start to the first one.

    PEER_PYTHON=/path/to/venv/bin/python python -m tests.bench peer

The interpreter named by PEER_PYTHON has `maxtext[tpu]` installed; see docs/performance.md. Its steps are taken twice: as it
comes, which is what the ratios are of, and with the memory allocator told to keep memory, as our trainer's parent tells it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench import pipeline, startup, step
from tests.bench.measure import Row, child_json, environment
from trainer.parent.allocator import KEPT

CHILD = Path(__file__).with_name("peer_child.py")
COMMON = {
    "hardware": "cpu", "skip_jax_distributed_system": "true", "dataset_type": "synthetic", "enable_checkpointing": "false",
    "base_emb_dim": 256, "base_mlp_dim": 1024, "base_num_query_heads": 4, "base_num_kv_heads": 4, "head_dim": 64, "vocab_size": 32000,
    "attention": "dot_product", "dtype": "float32", "jax_cache_dir": "",
}  # fmt: skip
TINY = {"base_num_decoder_layers": 4, "max_target_length": 256}
EIGHT = {"per_device_batch_size": 1, "ici_fsdp_parallelism": 8, "steps": 14}
PIPELINE = {
    "base_num_decoder_layers": 8, "max_target_length": 32, "per_device_batch_size": 2, "ici_pipeline_parallelism": 2,
    "num_pipeline_microbatches": 4, "num_layers_per_pipeline_stage": 2, "scan_layers_per_stage": "false", "steps": 15,
}  # fmt: skip
TO_FIRST_STEP = 0.43


@dataclass(frozen=True)
class Work:
    name: str
    devices: int
    limit: float
    peer: dict[str, object]
    ours: Callable[[], list[float]]  # CPU-seconds of a step, one per turn


WORKS = (
    Work("step, 1 device", 1, step.LIMIT[1], {**TINY, "per_device_batch_size": 4, "steps": 16}, lambda: _step(1)),
    Work("step, 8 devices", 8, step.LIMIT[8], {**TINY, **EIGHT}, lambda: _step(8)),
    Work("pipeline: step, 8 devices", 8, pipeline.LIMIT, PIPELINE, lambda: _pipeline()),
)


def rows() -> list[Row]:
    python = os.environ.get("PEER_PYTHON") or sys.exit("error: set PEER_PYTHON to a Python that has maxtext[tpu]")
    found: list[Row] = []
    for work in WORKS:
        peer, ours = _run(python, work, keep_memory=False), work.ours()
        starts = [_first_step() for _ in range(startup.RUNS)] if work.devices == 1 else []
        kept = _run(python, work, keep_memory=True)
        ours += work.ours()
        own, other, other_kept = median(ours), median(peer["steps"]), median(kept["steps"])
        note = f"{own:.2f} of {other:.2f} CPU-s; of {other_kept:.2f}, its memory kept too, {own / other_kept:.2f}"
        found.append(Row(f"beside MaxText: {work.name}", "ratio", own / other, work.limit, note))
        if starts:
            first = median([peer["first"], kept["first"]])
            note = f"{median(starts):.1f} of {first:.1f} CPU-s"
            found.append(Row("beside MaxText: start to first step, nothing cached", "ratio", median(starts) / first, TO_FIRST_STEP, note))
    return found


def _run(python: str, work: Work, *, keep_memory: bool) -> dict[str, Any]:
    """MaxText's own training program: CPU-seconds of its "steps" but the first two, and of the process when the "first" was done."""
    kept = {name: value for name, value in environment(work.devices).items() if name not in KEPT}
    given = {**kept, **(KEPT if keep_memory else {}), "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    given["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={work.devices}"
    with tempfile.TemporaryDirectory(prefix="bench-peer-") as folder:
        settings = {**COMMON, **work.peer, "base_output_directory": folder, "run_name": "bench"}
        output = Path(folder, "found.json")
        command = [python, str(CHILD), str(output), *(f"{name}={value}" for name, value in settings.items())]
        done = subprocess.run(command, env=given, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {CHILD.name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return json.loads(output.read_text())


def _step(devices: int) -> list[float]:
    return child_json(["-m", "tests.bench.step", str(devices)], devices=devices)["trainer"]["cpu"]


def _pipeline() -> list[float]:
    return child_json(["-m", "tests.bench.pipeline"], devices=pipeline.DEVICES)["pipelined"]["cpu"]


def _first_step() -> float:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        return startup.first_step(Path(folder, "run"), str(Path(folder, "cache")))
