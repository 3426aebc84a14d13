"""The trainer itself under the local backend: preemption, and the limit on attempts without progress."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from launcher.backend import JobState, JobStatus
from launcher.backend.local import LocalBackend
from launcher.backend.local_state import IDENTITY_ANNOTATION, JobFolder
from launcher.manifest import render
from launcher.spec import from_document
from tests.launcher.local_jobs import TRAIN, container_of, document, last, until
from tests.namespaces import pid_namespace
from trainer.checkpoint.commit import committed_steps

STEPS = 200  # of some milliseconds each: far more than pass between a signal and the agreement to leave


def trainer_pid(folder: JobFolder, worker: int, attempt: int) -> int | None:
    """Host process id of a pod's `python -m trainer`, which may be PID 1 of a namespace."""
    for pod in folder.read().pods:
        if pod["metadata"]["name"] == f"job-slice-0-{worker}-a{attempt}" and IDENTITY_ANNOTATION in pod["metadata"]["annotations"]:
            pid = int(pod["metadata"]["annotations"][IDENTITY_ANNOTATION].split()[0])
            if not pid_namespace():
                return pid
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            return int(children[0]) if children else None
    return None


def steps_done(run: Path) -> list[int]:
    """Numbers of the finished steps in the order they were recorded."""
    try:
        lines = (run / "metrics/metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [record["done"] for record in records if record["kind"] == "step"]


def create(backend: LocalBackend, directory: Path, *, hosts: int, steps: int, **changes: Any) -> JobStatus:
    kept = {"checkpoint": {"every_steps": 1000}, "compile_cache": str(directory / "compiled")}
    train = {**TRAIN, **kept, "steps": steps, "metrics": {"writers": ["console", "jsonl"]}}
    spec = document(directory, hosts=hosts, train=train, env={"XLA_FLAGS": "--xla_backend_optimization_level=0"}, **changes)
    rendered = render(from_document(spec))
    container = container_of(rendered)
    container["command"] = [*pid_namespace(), sys.executable, *container["command"][1:]]
    return backend.create(rendered)


def test_sigterm_to_one_of_two_processes_saves_on_both_restarts_for_free_and_completes(backend: LocalBackend, tmp_path: Path) -> None:
    folder, run = JobFolder(tmp_path / "state/default/job"), tmp_path / "job"
    create(backend, tmp_path, hosts=2, steps=STEPS, failure={"max_restarts": 0}, grace_seconds=60)
    until(lambda: len(steps_done(run)) >= 2, "the first steps")
    pid = trainer_pid(folder, 1, 0)
    assert pid is not None
    signalled = time.time()
    os.kill(pid, signal.SIGTERM)
    status = last(backend)
    assert (status.state, status.attempt, status.restarts_used, status.restarts_free) == (JobState.COMPLETED, 1, 0, 1)
    ends = [event for event in backend.events("job") if event.about in ("pod/job-slice-0-0-a0", "pod/job-slice-0-1-a0")]
    assert len(ends) == 2
    for event in ends:
        assert event.message.startswith("exit code 75: asked to leave; checkpoint ")
        assert event.at is not None and event.at.timestamp() - signalled < 15
    first, second = json.loads((run / "attempts.json").read_text())["attempts"]
    assert first["committed_step"] is None and 2 <= second["committed_step"] < STEPS
    assert steps_done(run) == list(range(1, STEPS + 1))  # none lost, none twice
    assert committed_steps(str(run)) == [second["committed_step"], STEPS]
    for attempt, worker in ((0, 0), (0, 1), (1, 0), (1, 1)):
        kept = (run / f"logs/attempt-{attempt}.slice-0.worker-{worker}.log").read_text()
        shown = [line.text for line in backend.logs("job", worker=worker) if line.attempt == attempt]
        assert kept.splitlines() == shown


def test_attempts_that_save_nothing_end_the_job_although_each_restart_was_free(backend: LocalBackend, tmp_path: Path) -> None:
    folder, account = JobFolder(tmp_path / "state/default/job"), tmp_path / "job/attempts.json"
    create(backend, tmp_path, hosts=1, steps=STEPS, failure={"max_restarts": 0})
    for attempt in range(3):  # asked to leave while it starts: nothing is unsaved, so it goes at once
        until(lambda n=attempt: account.exists() and len(json.loads(account.read_text())["attempts"]) > n, f"attempt {attempt}")
        pid = trainer_pid(folder, 0, attempt)
        assert pid is not None
        os.kill(pid, signal.SIGTERM)
    status = last(backend)
    assert (status.state, status.attempt, status.restarts_used, status.restarts_free) == (JobState.FAILED, 3, 0, 3)
    assert "exited with 70" in status.message
    assert "the last 3 attempts started before the first checkpoint and none saved a newer one" in status.message
    crash = json.loads((tmp_path / "job/logs/attempt-3.slice-0.worker-0.exit-70.crash.json").read_text())
    assert crash["exit_code"] == 70 and crash["phase"] == "startup"
