"""What the loop costs the host: work a step beside the compiled program, and the stall of an asynchronous save."""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench import work
from tests.bench.measure import Row, child_json

STEPS = 12
SAVES = 4


def rows() -> list[Row]:
    found = child_json(["-m", "tests.bench.loop"])
    stall = [save["stall"] / save["whole"] for save in found["saves"][1:]]  # the first creates folders and loads libraries
    seconds = ", ".join(f"{save['stall']:.2f} of {save['whole']:.2f} s" for save in found["saves"][1:])
    return [
        Row(
            "host work a step beyond the compiled call", "ms", 1000 * median(found["host"]), 2.5,
            f"CPU time of the loop's thread; the call itself {1000 * median(found['call']):.2f}",
        ),
        Row("stall of an asynchronous save", "ratio", median(stall), 0.10, f"of the whole save: {seconds}"),
    ]  # fmt: skip


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        return {**host_seconds(Path(folder, "run")), "saves": saves(Path(folder, "saves"))}


def host_seconds(directory: Path) -> dict[str, list[float]]:
    """CPU-seconds of the loop's own thread in each step of a real run, from one batch to the next: `call`, the call of the compiled
    step, and `host`, all else: feeding, metrics, checks.

    The compiled program runs on other threads, but for what it does before it is handed over; waiting for it costs no CPU time.
    """
    from trainer import run
    from trainer.config import TrainConfig, validate

    marks: list[float] = []
    calls: list[float] = []
    batches, make_step = run._batches, run._train_step

    def marked(*arguments: Any) -> Iterator[Any]:
        for numbered in batches(*arguments):
            marks.append(time.thread_time())
            yield numbered

    def timed(*arguments: Any) -> Any:
        step = make_step(*arguments)

        def call(*operands: Any) -> Any:
            begin = time.thread_time()
            result = step(*operands)
            calls.append(time.thread_time() - begin)
            return result

        return call

    run._batches, run._train_step = marked, timed
    document = work.document(str(directory), 1, metrics={"writers": ["jsonl", "tensorboard"]})
    document |= {"steps": STEPS, "schedule": {"type": "constant", "learning_rate": 1e-5}}
    run.run(validate(TrainConfig, document))
    whole = [after - before for before, after in itertools.pairwise(marks[2:])]  # after compilation
    return {"call": calls[2:], "host": [step - call for step, call in zip(whole, calls[2:], strict=False)]}


def saves(directory: Path) -> list[dict[str, float]]:
    """Seconds `save` blocks, and until the step is committed, for the 247 MB state of the work."""
    import jax

    from trainer.checkpoint import Checkpoints
    from trainer.parallel.mesh import build_mesh
    from trainer.parallel.sharding import Layout
    from trainer.state import describe_state, initial_state, state_items

    config = work.config(1)
    layout = Layout(build_mesh(config.mesh, jax.devices(), slices=1))
    state = jax.block_until_ready(initial_state(config, describe_state(config, layout)))
    checkpoints = Checkpoints(config.checkpoint, str(directory))
    found: list[dict[str, float]] = []
    for step in range(1, SAVES + 1):
        begin = time.monotonic()
        checkpoints.save(step, state_items(state), {})
        stall = time.monotonic() - begin
        checkpoints.wait()
        found.append({"stall": stall, "whole": time.monotonic() - begin})
    return found


if __name__ == "__main__":
    print(json.dumps(measure()))
    sys.stdout.flush()
