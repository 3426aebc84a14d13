"""The two runs and the verdict."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final, NoReturn

from trainer.contract import DEVICES_PER_HOST, IMAGE_REVISION, METRICS_FOLDER, Exit
from trainer.errors import NotInstalled
from trainer.parent.installed import require_jax

DEVICES: Final = 8
STEPS: Final = 24
STEP_MARK: Final = f"/{STEPS}]"  # the console's `[done/total]`
MAX_SECONDS: Final = 600

CONFIG: Final[dict[str, Any]] = {
    "steps": STEPS,
    "model": {"preset": "tiny", "width": 64, "segments": {"0": {"repeats": 2}}},
    "batch": {"global_batch": 8, "sequence_length": 128},
    "mesh": {"ici": {"data": 2, "fsdp": 2, "tensor": 2}},
    "schedule": {"type": "cosine", "learning_rate": 1e-3, "warmup_steps": 4},
    "data": {"sources": [{"type": "python_standard_library", "max_bytes": 300_000}]},
    "checkpoint": {"every_steps": 1_000},  # only what the signal and the end ask for
    "metrics": {"writers": ["console", "jsonl"]},
}


class Failed(Exception):
    """The installation does not do what it must; the text says what."""


def main() -> int:
    """Run all of it, print a verdict, return the exit code: 0, 70 when something is not as it must be, 64 without JAX."""
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    try:
        require_jax()
    except NotInstalled as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="smoke-") as folder:
        try:
            summary = _smoke(Path(folder))
        except Failed as error:
            print(f"smoke: FAILED: {error}", file=sys.stderr, flush=True)
            return Exit.SOFTWARE
    print(f"smoke: OK: {summary}; {time.monotonic() - began:.0f} s", flush=True)
    return Exit.DONE


def _smoke(folder: Path) -> str:
    whole, parted = folder / "whole", folder / "parted"
    _say(f"a run of {STEPS} steps on {DEVICES} CPU devices, left alone")
    _expect(Exit.DONE, _train(folder, whole), "the run that is left alone")
    _say("the same run, asked to leave after its first steps")
    _expect(Exit.PREEMPTED, _train(folder, parted, leave=True), "the run that got SIGTERM")
    before = losses(parted)
    _say(f"it left after step {len(before)} with a checkpoint; a fresh process goes on")
    _expect(Exit.DONE, _train(folder, parted), "the run that goes on")
    expected, got = losses(whole), losses(parted)
    if len(expected) != STEPS or not 0 < len(before) < STEPS:
        raise Failed(f"logged {len(expected)} steps of the whole run and {len(before)} before the interruption; {STEPS} are due")
    different = [step for step in expected if expected[step] != got.get(step)]
    if different:
        raise Failed(f"losses differ from step {different[0]} on: {expected[different[0]]!r} and {got.get(different[0])!r}")
    tensors = _compare(whole, parted)
    return (
        f"{STEPS} losses and {tensors} tensors are bitwise equal to an uninterrupted run's "
        f"(left after step {len(before)}, loss {expected[1]:.4f} -> {expected[STEPS]:.4f})"
    )


def losses(run_directory: Path) -> dict[int, float]:
    """Loss by finished step. Raises Failed where two attempts logged different ones for the same step."""
    found: dict[int, float] = {}
    for text in (run_directory / METRICS_FOLDER / "metrics.jsonl").read_text().splitlines():
        record = json.loads(text)
        if record["kind"] == "step" and found.setdefault(record["done"], record["loss"]) != record["loss"]:
            raise Failed(f"step {record['done']} was done twice, with losses {found[record['done']]!r} and {record['loss']!r}")
    return found


def _train(folder: Path, run_directory: Path, *, leave: bool = False) -> int:
    """Exit code of one `python -m trainer`; with `leave` it gets SIGTERM once it has logged a step."""
    config = folder / "train.json"
    config.write_text(json.dumps({**CONFIG, "run_directory": str(run_directory), "compile_cache": str(folder / "compiled")}))
    command = [sys.executable, "-m", "trainer", "--config", str(config)]
    with subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, text=True, errors="replace") as process:
        late = threading.Timer(MAX_SECONDS, process.kill)
        late.start()
        try:
            for line in process.stdout or ():
                print(f"  {line}", end="", flush=True)
                if leave and STEP_MARK in line:
                    process.send_signal(signal.SIGTERM)
                    leave = False
            return process.wait()
        finally:
            late.cancel()
            process.kill()  # nothing when it has ended


def _compare(whole: Path, parted: Path) -> int:
    """Number of tensors in the last checkpoints, all of them equal."""
    result = subprocess.run(
        [sys.executable, "-m", "trainer.smoke.compare", str(whole), str(parted), str(STEPS)],
        env=_environment(), capture_output=True, text=True, timeout=MAX_SECONDS, check=False,
    )  # fmt: skip
    if result.returncode:
        raise Failed((result.stderr.strip().splitlines() or ["the checkpoints could not be compared"])[-1])
    return int(result.stdout)


def _environment() -> dict[str, str]:
    """This process's, without what would make the trainers a part of some job."""
    job = ("NNX_", "JOB_COMPLETION_", "TPU_", "MEGASCALE_")
    kept = {name: value for name, value in os.environ.items() if name == IMAGE_REVISION or not name.startswith(job)}
    return {**kept, DEVICES_PER_HOST: str(DEVICES), "JAX_PLATFORMS": "cpu"}


def _expect(code: Exit, got: int, who: str) -> None:
    if got != code:
        raise Failed(f"{who} ended with exit code {got} instead of {code.value}")


def _say(text: str) -> None:
    print(f"smoke: {text}", flush=True)


def _leave(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)
