"""Two slices of the local backend, each a JAX world of its own: one is killed, the other goes on, and it joins again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from launcher.backend import JobState
from launcher.backend.local import LocalBackend
from launcher.backend.local_pod import descendants
from launcher.backend.local_state import JobFolder
from launcher.manifest import render
from launcher.spec import from_document
from tests.gcs_emulator import Gcs
from tests.launcher.local_jobs import TRAIN, document, last, until
from trainer.checkpoint.arrays import read_part
from trainer.checkpoint.commit import META_FILE, checkpoint_directory
from trainer.checkpoint.storage import open_storage
from trainer.contract import slice_directory
from trainer.worlds.rounds import Record, Rounds

STEPS = 400
DILOCO = {"sync_every_steps": 2, "transport": {"type": "files", "wait_seconds": 40}}


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.full)])
def directory(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "folder":
        return str(tmp_path / "runs")
    gcs: Gcs = request.getfixturevalue("gcs")
    for name, value in gcs.environment.items():
        monkeypatch.setenv(name, value)
    return f"{gcs.url}/local-worlds"


def signal_slice(folder: JobFolder, index: int, number: int) -> None:
    """To every process of the running pod of a slice."""
    pods = [pod for pod in folder.read().pods if pod["metadata"]["name"].startswith(f"job-slice-{index}-")]
    running = [pod["metadata"]["uid"] for pod in pods if pod["status"]["phase"] == "Running"]
    for pid in descendants(running):
        os.kill(pid, number)


def records(rounds: Rounds) -> list[Record]:
    return [record for number in range(1, rounds.newest() + 1) if (record := rounds.record(number))]


def announced(rounds: Rounds, index: int, after: int) -> bool:
    """Whether the slice has come to a round after that one, or said that it will."""
    names = [path.partition("/") for path in rounds.storage.files()]
    return any(int(number) > after and name in (f"slice-{index}.here", f"slice-{index}.json") for number, _, name in names)


def said(folder: JobFolder, message: str) -> str:
    """Why the job has failed, and the ends of what its pods said."""
    logs = sorted(folder.pods.glob("*/log"))
    return "\n".join([message, *(f"== {log.parent.name}\n{log.read_text()[-2000:]}" for log in logs)])


def parameters(run_directory: str) -> dict[str, np.ndarray]:
    root = f"{checkpoint_directory(run_directory)}/{STEPS}"
    meta = json.loads(open_storage(root).read(META_FILE))
    return {f"{item}/{path}": read_part(f"{root}/{item}", path, ()) for item in ("params", "opt") for path in meta["items"][item]}


@pytest.mark.full
def test_a_killed_slice_is_left_out_the_other_goes_on_and_both_end_with_the_same_parameters(
    backend: LocalBackend, directory: str, tmp_path: Path
) -> None:
    train = {**TRAIN, "steps": STEPS, "diloco": DILOCO, "checkpoint": {"every_steps": 100}, "metrics": {"writers": ["console", "jsonl"]}}
    spec = document(tmp_path, slices=2, train=train, env={"XLA_FLAGS": "--xla_backend_optimization_level=0"})
    backend.create(render(from_document({**spec, "directory": directory})))
    folder, rounds = JobFolder(tmp_path / "state/default/job"), Rounds(f"{directory}/job", index=0, slices=2)

    until(lambda: announced(rounds, 0, 0) or announced(rounds, 1, 0), "a slice")
    first = 0 if announced(rounds, 0, 0) else 1
    signal_slice(folder, first, signal.SIGSTOP)
    until(lambda: announced(rounds, 1 - first, 0), "the other slice")
    signal_slice(folder, first, signal.SIGCONT)
    until(lambda: any(record.slices == [0, 1] for record in records(rounds)), "a round of both")

    signal_slice(folder, 1, signal.SIGSTOP)
    before = rounds.newest()
    until(lambda: any(record.slices == [0] for record in records(rounds)[before:]), "a round without the other slice")
    signal_slice(folder, 0, signal.SIGSTOP)
    signal_slice(folder, 1, signal.SIGKILL)
    left = rounds.newest()
    until(lambda: announced(rounds, 1, left), "the slice that joins again")
    signal_slice(folder, 0, signal.SIGCONT)

    status = last(backend)
    assert (status.state, status.attempt) == (JobState.COMPLETED, 0), said(folder, status.message)
    found = records(rounds)
    assert len(found) == STEPS // 2 and [0, 1] in [record.slices for record in found[left:]]
    ours, theirs = (parameters(slice_directory(f"{directory}/job", index)) for index in (0, 1))
    assert ours.keys() == theirs.keys() and len(ours) > 4
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)
    if not directory.startswith("gs://"):
        lines = [json.loads(line) for line in Path(directory, "job/metrics/metrics.jsonl").read_text().splitlines()]
        told = {line["round"]: line["slices"] for line in lines if line.get("event") == "round"}
        assert told == {record.round: record.slices for record in found}
