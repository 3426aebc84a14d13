"""The image trains, resumes exactly, and leaves in time, under a read-only root without capabilities or network."""

from __future__ import annotations

import json
import time
from typing import Any

from tests.container.engine import docker, new_volume, run, run_python, started, wait_for_line
from trainer.contract import Exit

TRAIN: dict[str, Any] = {
    "run_directory": "/volume/run",
    "steps": 100_000,
    "model": {"preset": "tiny", "width": 64, "segments": {"0": {"repeats": 2}}},
    "batch": {"global_batch": 8, "sequence_length": 128},
    "schedule": {"type": "constant", "learning_rate": 1e-3},
    "data": {"sources": [{"type": "python_standard_library", "max_bytes": 300_000}]},
    "checkpoint": {"every_steps": 1_000_000},
}
COMMITTED = "from trainer.checkpoint.commit import committed_steps; print(committed_steps('/volume/run'))"


def test_the_smoke_test_passes(image: str) -> None:
    done = run(image, "smoke", timeout=600)
    assert done.returncode == 0, done.stdout
    assert "smoke: OK: 24 losses and " in done.stdout


def test_docker_stop_ends_training_within_10_seconds_with_75_and_a_committed_checkpoint(image: str) -> None:
    with new_volume(image) as volume:
        options = ("--volume", f"{volume}:/volume", "--env", "NNX_DEVICES_PER_HOST=8", "--entrypoint", "python")
        write = f"import json, os; json.dump({json.dumps(TRAIN)}, open('/volume/train.json', 'w'))"
        run_python(image, write, options=("--volume", f"{volume}:/volume"))
        with started(image, "-m", "trainer", "--config", "/volume/train.json", options=options) as container:
            wait_for_line(container, "/100000]")
            began = time.monotonic()
            docker("stop", "--time", "30", container)
            took = time.monotonic() - began
            code = int(docker("inspect", "--format", "{{.State.ExitCode}}", container).stdout)
            log = docker("logs", container).stdout
        committed = json.loads(run_python(image, COMMITTED, options=("--volume", f"{volume}:/volume")))
    assert code == Exit.PREEMPTED, log
    assert len(committed) == 1, log
    assert took < 10
