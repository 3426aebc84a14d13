"""Logs and metrics on gs://: what the parent's uploader keeps of processes that are killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.cloud import storage

from launcher.backend.selection import Selection
from launcher.observe.kept_logs import kept_lines
from tests.gcs_emulator import Gcs, gcs_emulator
from tests.trainer.test_process_parent import Start, line, start
from trainer.attempts import how_it_ended

__all__ = ["start"]


@pytest.fixture(scope="module")
def server() -> Iterator[Gcs]:
    with gcs_emulator() as gcs, pytest.MonkeyPatch.context() as patch:
        for name, value in gcs.environment.items():
            patch.setenv(name, value)
        yield gcs


def lines(directory: str) -> list[str]:
    """As `nnxlaunch logs --previous` reads them."""
    return [line.text for line in kept_lines(directory, 0, Selection())]


def objects(gcs: Gcs, prefix: str) -> dict[str, bytes]:
    blobs = storage.Client(project="test").bucket(gcs.bucket).list_blobs(prefix=f"{prefix}/")
    return {blob.name.removeprefix(f"{prefix}/"): blob.download_as_bytes() for blob in blobs}


def test_of_a_child_killed_with_sigkill_log_metrics_and_evidence_are_kept_behind_those_of_an_earlier_life(
    server: Gcs, start: Start
) -> None:
    directory = f"{server.url}/killed"
    said = ["before storage is known", "started"]
    for life in (1, 2):
        process = start("uploads", directory)
        process.communicate()
        assert process.returncode == 137
        kept = lines(directory)
        assert len(kept) == 3 * life
        assert kept[-3:-1] == said
        assert kept[-1].startswith("exit code 137: killed with SIGKILL") and f"{directory}/logs/" in kept[-1]
    found = objects(server, "killed")
    name = "logs/attempt-0.slice-0.worker-0"
    bundles = [f"{name}.exit-137-0000{life}.crash.json" for life in (0, 1)]
    assert {*bundles, *(f"{name}-0000{life}.log" for life in (0, 1))} < set(found)
    assert b'"exit_code": 137' in found[bundles[1]]
    end = how_it_ended(directory, 0, [(0, 0), (0, 1)])
    assert end.startswith("slice 0, worker 0 exited with 137: killed with SIGKILL")
    assert found["metrics/events-00001"] == bytes(range(256))
    assert found["metrics/metrics-00000-00000.jsonl"] == b'{"step": 0}\n{"step": 1}\n{"step": 2}\n'


def test_when_the_parent_is_killed_too_what_was_said_is_still_uploaded(server: Gcs, start: Start) -> None:
    directory = f"{server.url}/gone"
    process = start("uploads", directory, TALK="yes")
    said = [line(process) for _ in range(5000)]  # more than the pipes on the way hold
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()  # the uploader has its standard error, so this waits for its end
    kept = lines(directory)
    assert kept[:1000] == said[:1000] == ["before storage is known", "started", *(f"line {number}" for number in range(998))]


def test_storage_that_does_not_answer_costs_the_cause_a_few_seconds_and_not_its_exit_code(start: Start, tmp_path: Path) -> None:
    process = start("uploads", "gs://bucket/away", STORAGE_EMULATOR_HOST="http://127.0.0.1:9")
    _, errors = process.communicate()
    assert process.returncode == 137
    assert "gs://bucket/away does not answer" in errors
