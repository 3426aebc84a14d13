"""kill -9 at random moments of a loop of asynchronous saves. Prints one JSON line per killed process.

    python -m tests.trainer.checkpoint.killed_saves DIRECTORY TRIALS SEED

One process imports everything and starts no thread; each trial is a fork of it that resumes, compares, and saves
until it is killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

import orbax.checkpoint  # noqa: F401  (imported once, before the forks)

from tests.trainer.checkpoint.states import abstract, differences, mesh, state
from trainer.checkpoint import Checkpoints
from trainer.config.run import Checkpoint

KILLED_WITHIN_SECONDS = 0.4


def save_until_killed(directory: str, report: int) -> None:
    def tell(**fields: Any) -> None:
        os.write(report, json.dumps(fields).encode() + b"\n")

    on = mesh(1)
    checkpoints = Checkpoints(Checkpoint(keep_last=2, keep_every_steps=10), directory)
    latest = checkpoints.latest_step()
    wrong = differences(checkpoints.restore(latest, abstract(on)), latest, on) if latest is not None else []
    tell(latest=latest, wrong=wrong, skipped=list(checkpoints.skipped.values()))
    step = latest or 0
    while True:
        step += 1
        checkpoints.save(step, state(step, on), {})  # waits until the one before is committed
        tell(committed=step - 1)


def trial(directory: str, saves: int, seconds: float) -> dict[str, Any]:
    """Fork, kill after that many saves have begun and `seconds` more; what the process told."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            save_until_killed(directory, writing)
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading, encoding="utf-8") as told:
        lines = [told.readline() for _ in range(1 + saves)]
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        lines += told.readlines()
    _, status = os.waitpid(child, 0)
    messages = [json.loads(line) for line in lines if line.endswith("\n")]
    committed = [message["committed"] for message in messages if "committed" in message]
    return {**messages[0], "committed": max(committed, default=0), "killed": os.WIFSIGNALED(status), "seconds": seconds}


def main() -> None:
    directory, trials, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    moments = random.Random(seed)
    for _ in range(trials):
        print(json.dumps(trial(directory, moments.randint(1, 3), moments.uniform(0, KILLED_WITHIN_SECONDS))), flush=True)


if __name__ == "__main__":
    main()
