"""What the launcher reads of the logs that the trainer keeps in a run directory, on this machine and on gs://."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.cloud import storage

from launcher.backend.selection import Selection
from launcher.errors import NotFound, Unavailable
from launcher.observe.kept_logs import kept_lines
from tests.gcs_emulator import gcs_emulator

FILES = {
    "attempt-0.slice-0.worker-0.log": "first\n",
    "attempt-1.slice-0.worker-1.log": "b1\nb2\n",
    "attempt-1.slice-0.worker-0.log": "a1\na2 without an end",
    "attempt-10.slice-0.worker-0.log": "later\n",
    "attempt-1.slice-0.worker-0.crash.json": "{}",
}


def told(directory: str, attempt: int | None, **selected: int) -> list[str]:
    return [f"{line.prefix} {line.text}" for line in kept_lines(directory, attempt, Selection(**selected))]


def test_the_lines_of_one_attempt_are_read_host_by_host(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for name, text in FILES.items():
        (tmp_path / "logs" / name).write_text(text)
    directory = str(tmp_path)
    assert told(directory, 1) == ["[s0/w0 a1] a1", "[s0/w0 a1] a2 without an end", "[s0/w1 a1] b1", "[s0/w1 a1] b2"]
    assert told(directory, 1, worker=1) == ["[s0/w1 a1] b1", "[s0/w1 a1] b2"]
    assert told(directory, None) == ["[s0/w0 a1] a1", "[s0/w0 a1] a2 without an end"], "worker 1 has had one attempt only"
    with pytest.raises(NotFound, match="no log of an attempt before the newest of its host; attempts with logs: 0, 1, 10"):
        told(directory, None, worker=1)
    with pytest.raises(NotFound, match="no log of attempt 2; attempts with logs: 0, 1, 10"):
        told(directory, 2)
    with pytest.raises(Unavailable, match="it is a path of the job's pods"):
        told(f"{directory}/elsewhere", 1)


def test_parts_on_gs_are_one_log(monkeypatch: pytest.MonkeyPatch) -> None:
    with gcs_emulator() as gcs:
        for name, value in gcs.environment.items():
            monkeypatch.setenv(name, value)
        bucket = storage.Client(project="test").bucket(gcs.bucket)
        for part, text in (("00001", "three\n"), ("00000", "one\ntwo\n")):
            bucket.blob(f"runs/a/logs/attempt-0.slice-2.worker-3-{part}.log").upload_from_string(text)
        assert told(f"{gcs.url}/runs/a", 0) == ["[s2/w3 a0] one", "[s2/w3 a0] two", "[s2/w3 a0] three"]
