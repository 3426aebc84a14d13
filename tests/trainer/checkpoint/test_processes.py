"""Two processes save and restore together; one process reads what two wrote, and the other way round; gs:// too."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gcs_emulator import Gcs, gcs  # noqa: F401  (a fixture)
from tests.trainer.checkpoint.states import abstract, differences, mesh, state, values
from trainer.checkpoint import Checkpoints
from trainer.checkpoint.commit import committed_steps
from trainer.checkpoint.storage import open_storage
from trainer.config.run import Checkpoint
from trainer.contract import Exit
from trainer.errors import CheckpointError

SCENARIOS = ("one_reads", "reader_fails", "local", "bucket", "failed", "damaged")


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, gcs: Gcs) -> dict[str, Any]:  # noqa: F811
    """What each of two processes reports about each scenario, after one process saved step 10 everywhere."""
    folder = tmp_path_factory.mktemp("two")
    local, bucket, failed, damaged = str(folder / "local"), f"{gcs.url}/run", folder / "failed", folder / "damaged"
    for directory in (local, bucket):
        checkpoints = Checkpoints(Checkpoint(), directory)
        assert checkpoints.latest_step() is None
        checkpoints.save(10, state(10, mesh(8)), {"processes": 1})
        checkpoints.close()
    for copy in (failed, damaged):
        shutil.copytree(local, copy)
    shutil.copytree(damaged / "checkpoints/10", damaged / "checkpoints/5")
    storage = open_storage(str(damaged / "checkpoints"))
    make_step(storage, 5)
    flipped = max((damaged / "checkpoints/10").rglob("d/*"), key=lambda path: path.stat().st_size)
    flipped.write_bytes(bytes([flipped.read_bytes()[0] ^ 1]) + flipped.read_bytes()[1:])
    tasks = [
        f"one_reads={bucket}",
        f"reader_fails={local}",
        f"resume_and_save={local}",
        f"resume_and_save={bucket}",
        f"one_fails={failed}",
        f"damaged={damaged}",
    ]
    reports = run_two(tasks, folder)
    return {"directories": {"local": local, "bucket": bucket}} | {
        name: [report[number] for report in reports] for number, name in enumerate(SCENARIOS)
    }


def make_step(storage: Any, step: int) -> None:
    """Give a copied step directory a commit file of its own."""
    from dataclasses import replace

    from trainer.checkpoint.commit import decode, encode

    commit = decode(storage.read(f"{step}/commit.json"))
    storage.write(f"{step}/commit.json", encode(replace(commit, step=step)))


def run_two(tasks: list[str], folder: Path) -> list[list[dict[str, Any]]]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.trainer.checkpoint.two_processes"]
    logs = [folder / f"process{index}.log" for index in range(2)]
    processes: list[subprocess.Popen[str]] = []
    for index, log in enumerate(logs):
        with open(log, "w") as errors:
            processes.append(subprocess.Popen([*command, str(index), str(port), *tasks], stdout=subprocess.PIPE, stderr=errors, text=True))
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [0, 0], "\n".join(log.read_text()[-4000:] for log in logs)
    return [[json.loads(line) for line in output.splitlines() if line.startswith("{")] for output in outputs]


@pytest.mark.parametrize("where", ["local", "bucket"])
def test_two_processes_continue_what_one_saved_and_delete_old_steps(answers: dict[str, Any], where: str) -> None:
    for report in answers[where]:
        assert report == {"first": 10, "wrong": [], "latest": 40, "steps": [30, 40], "programs": [], "messages": 1}


@pytest.mark.parametrize("where", ["local", "bucket"])
def test_one_process_continues_what_two_saved(answers: dict[str, Any], where: str) -> None:
    directory = answers["directories"][where]
    checkpoints = Checkpoints(Checkpoint(keep_last=2), directory)
    assert checkpoints.latest_step() == 40
    assert checkpoints.meta(40) == {"processes": 2}
    on = mesh(2, 2)
    assert differences(checkpoints.restore(40, abstract(on)), 40, on) == []
    checkpoints.save(45, state(45, on), {})
    checkpoints.close()
    assert committed_steps(directory) == [40, 45]
    names = {path.partition("/")[0] for path in open_storage(f"{directory}/checkpoints").files()}
    assert names == {"40", "45"}


def test_one_replica_reads_for_both_and_the_other_process_gets_the_same_bits_without_reading(answers: dict[str, Any]) -> None:
    first, second = answers["one_reads"]
    stored = sum(value.nbytes for item in values(10).values() for value in item.values())
    assert [report["wrong"] for reports in (first, second) for report in reports.values()] == [[]] * 4
    assert min(reports["all_replicas"]["bytes"] for reports in (first, second)) > 2 * stored  # restored twice
    assert first["one_replica"]["bytes"] > 2 * stored
    assert second["one_replica"]["bytes"] == 0


def test_where_the_replica_that_reads_cannot_both_fail_with_its_cause(answers: dict[str, Any]) -> None:
    reader, waiting = answers["reader_fails"]
    assert "cannot be read: Input/output error" in reader["error"] and reader["code"] == Exit.CONFIG
    assert waiting["error"].startswith("process 0: ") and waiting["error"].endswith(reader["error"])
    assert waiting["code"] == Exit.PEER


def test_each_process_writes_its_own_shards(answers: dict[str, Any]) -> None:
    files = open_storage(f"{answers['directories']['local']}/checkpoints").files("40/params")
    sizes = [sum(file.bytes for path, file in files.items() if f"/ocdbt.process_{index}/" in path) for index in range(2)]
    data = sum(value.nbytes for value in values(40)["params"].values())
    assert min(sizes) > 0.4 * data
    assert max(sizes) < 0.6 * data + 5000  # and Orbax's index of all tensors, most of it in process 0's folder


def test_a_save_that_fails_on_one_process_ends_on_both_with_the_cause(answers: dict[str, Any]) -> None:
    survivor, cause = answers["failed"]
    assert "step 50 could not be saved" in cause["error"] and "File too large" in cause["error"]
    assert cause["code"] == Exit.CONFIG
    assert "step 50 could not be saved by process 1:" in survivor["error"] and "File too large" in survivor["error"]
    assert survivor["code"] == Exit.PEER
    assert max(survivor["seconds"], cause["seconds"]) < 30
    assert survivor["latest"] == cause["latest"] == 10


def test_both_processes_fall_back_from_a_damaged_step(answers: dict[str, Any]) -> None:
    for report in answers["damaged"]:
        assert report == {"latest": 5, "skipped": [10]}


def test_a_bucket_object_that_changed_hides_its_step(answers: dict[str, Any]) -> None:
    directory = answers["directories"]["bucket"]
    storage = open_storage(f"{directory}/checkpoints")
    path = next(path for path in storage.files("40/params") if "/d/" in path)
    content = storage.read(path)
    storage.write(path, content[:-1] + bytes([content[-1] ^ 1]))
    checkpoints = Checkpoints(Checkpoint(), directory)
    assert checkpoints.latest_step() == 45
    assert "has CRC32C" in checkpoints.skipped[40]
    checkpoints.save(50, state(50, mesh(8)), {})
    checkpoints.close()
    assert committed_steps(directory) == [45, 50]
    assert any(path.startswith("quarantine/40/params/") for path in storage.files())


def test_a_bucket_commit_file_is_created_once_and_a_lost_answer_is_not_an_error(answers: dict[str, Any]) -> None:
    storage = open_storage(f"{answers['directories']['bucket']}/once")
    storage.write_new("7/commit.json", b"mine")
    storage.write_new("7/commit.json", b"mine")
    with pytest.raises(FileExistsError):
        storage.write_new("7/commit.json", b"theirs")
    assert storage.read("7/commit.json") == b"mine"
    assert storage.crc32c("7/commit.json") == storage.files()["7/commit.json"].crc32c
    storage.remove("7/commit.json")
    storage.remove("7/commit.json")
    for missing in (storage.read, storage.crc32c):
        with pytest.raises(FileNotFoundError):
            missing("7/commit.json")


def test_a_bucket_that_does_not_exist_is_named(answers: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="gs://no-such-bucket/run/checkpoints cannot be read"):
        Checkpoints(Checkpoint(), "gs://no-such-bucket/run").latest_step()
