"""`python -m trainer` where it ends before JAX is imported, the account of attempts, and lost peers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.attempts import Attempt, after_its_last_log, how_it_ended, log_stem, record_attempt, require_progress, without_progress
from trainer.checkpoint.commit import COMMIT_FILE, Commit, encode
from trainer.config import ConfigError
from trainer.contract import ATTEMPT, ATTEMPTS_FILE, CHECKPOINT_FOLDER, DEVICES_PER_HOST, HINT, TERMINATION_LOG
from trainer.distributed import lost_peer
from trainer.errors import NoProgress
from trainer.worker import prepare_environment, require_directory, unexpected
from trainer.worlds.rounds import decided_rounds

ROOT = Path(__file__).resolve().parents[2]


def commit(run: Path, step: int) -> None:
    """A committed, empty step."""
    folder = run / CHECKPOINT_FOLDER / str(step)
    folder.mkdir(parents=True)
    (folder / COMMIT_FILE).write_bytes(encode(Commit(step, {})))


def train(tmp_path: Path, config: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "train.yaml").write_text(config)
    return subprocess.run(
        [sys.executable, "-m", "trainer", "--config", str(tmp_path / "train.yaml"), *words],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, TERMINATION_LOG: str(tmp_path / "termination-log"), **environment},
    )  # fmt: skip


def valid(tmp_path: Path) -> str:
    return (
        f"{{run_directory: {tmp_path}/run, steps: 3, model: {{preset: tiny}}, batch: {{global_batch: 8, sequence_length: 64}},"
        "schedule: {type: constant, learning_rate: 0.001}, data: {sources: [{type: synthetic}]}}"
    )


def test_a_bad_config_prints_every_problem_and_exits_64(tmp_path: Path) -> None:
    ended = train(tmp_path, "steps: 0\nmodel: {preset: tinny}\nsede: 1\n")
    assert ended.returncode == 64
    for words in ("error: steps:", "'tinny'", "did you mean 'seed'?", "error: schedule: is required", "error: data: is required"):
        assert words in ended.stderr
    assert (tmp_path / "termination-log").read_text().startswith(("run_directory: is required", "steps:"))
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("run_directory") == 1 and ended.stderr.endswith("\nexit code 64\n")
    assert not list(tmp_path.glob("*crash*"))


def test_wrong_usage_is_said_once_and_leaves_nothing_behind(tmp_path: Path) -> None:
    ended = train(tmp_path, "", "--cofnig")
    assert ended.returncode == 2
    assert ended.stderr.count("unrecognized arguments: --cofnig") == 1 and ended.stderr.endswith("\nexit code 2\n")
    assert not list(tmp_path.glob("*crash*"))


@pytest.fixture
def launcher_only(tmp_path: Path) -> str:
    """A PYTHONPATH on which what only training needs is not installed."""
    folder = tmp_path / "path"
    folder.mkdir()
    missing = ("jax", "jaxlib", "flax", "optax", "orbax", "grain", "numpy", "gcsfs", "tokenizers")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({missing}))\n")
    return str(folder)


def test_without_jax_training_says_what_to_install_and_writes_nothing(tmp_path: Path, launcher_only: str) -> None:
    ended = train(tmp_path, valid(tmp_path), PYTHONPATH=launcher_only)
    assert ended.returncode == 64
    assert ended.stderr.startswith("error: JAX is not installed here") and "`./setup.sh train`" in ended.stderr
    assert "Traceback" not in ended.stderr and not (tmp_path / "run").exists()


def test_without_jax_the_smoke_test_says_what_to_install(launcher_only: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "trainer", "smoke"],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": launcher_only},
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (64, "")
    assert ended.stderr.splitlines()[0].startswith("error: JAX is not installed here") and "`./setup.sh train`" in ended.stderr


def test_three_attempts_without_progress_end_the_next_one_before_jax_is_imported(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for attempt in range(3):
        record_attempt(str(run), attempt)
    ended = train(tmp_path, valid(tmp_path), **{ATTEMPT: "3", "JAX_PLATFORMS": "there is no such platform"})
    assert ended.returncode == 70
    message, _, hint = (tmp_path / "termination-log").read_text().partition(f"\n{HINT}")
    assert message == "the last 3 attempts started before the first checkpoint and none saved a newer one"
    assert hint and f"error: {message}\nhint: {hint}\n" in (run / "logs/attempt-3.slice-0.worker-0.log").read_text()


def test_progress_restarts_the_count_and_attempt_zero_the_account(tmp_path: Path) -> None:
    run = str(tmp_path)
    assert [record_attempt(run, attempt).committed_step for attempt in range(3)] == [None] * 3
    commit(tmp_path, 10)
    assert [record_attempt(run, attempt).committed_step for attempt in (3, 4, 5)] == [10] * 3
    with pytest.raises(NoProgress, match="at checkpoint 10") as refused:
        require_progress(run, 6)
    assert refused.value.exit_code == 70
    require_progress(run, 0)
    require_progress(run, 6)


def test_attempts_that_end_while_the_data_are_prepared_do_not_count(tmp_path: Path) -> None:
    run = str(tmp_path)
    for attempt in range(5):  # none of them gets as far as being recorded
        require_progress(run, attempt)
    for attempt in (5, 6, 7):
        require_progress(run, attempt)
        record_attempt(run, attempt)
    with pytest.raises(NoProgress, match="the last 3 attempts started before the first checkpoint"):
        require_progress(run, 8)


def test_an_attempt_started_twice_counts_once(tmp_path: Path) -> None:
    for attempt in (0, 1, 1, 1, 1, 2):
        record_attempt(str(tmp_path), attempt)
    assert [entry["attempt"] for entry in json.loads((tmp_path / ATTEMPTS_FILE).read_text())["attempts"]] == [0, 1, 2]


def test_a_torn_account_begins_anew(tmp_path: Path) -> None:
    record_attempt(str(tmp_path), 0)
    (tmp_path / ATTEMPTS_FILE).write_text('{"attempts": [{"attempt"')
    require_progress(str(tmp_path), 1)
    record_attempt(str(tmp_path), 1)
    assert [entry["attempt"] for entry in json.loads((tmp_path / ATTEMPTS_FILE).read_text())["attempts"]] == [1]


def test_only_the_latest_attempts_at_the_same_step_count() -> None:
    account = [Attempt(index, step, "") for index, step in enumerate((None, None, 5, 5, None))]
    assert without_progress(account, None) == 1 and without_progress(account[:4], 5) == 2 and without_progress([], None) == 0


def test_a_slice_that_falls_behind_while_the_others_go_on_has_not_stopped_making_progress(tmp_path: Path) -> None:
    run, own = tmp_path, str(tmp_path / "slices/1")
    assert decided_rounds(str(run)) == 0
    for attempt in range(6):
        require_progress(own, attempt, rounds=decided_rounds(str(run)))
        record_attempt(own, attempt, rounds=decided_rounds(str(run)))
        decided = run / f"rounds/{attempt + 1:08d}/decided.json"
        decided.parent.mkdir(parents=True)
        decided.touch()
    for attempt in (6, 7, 8):  # from here on nobody decides anything
        require_progress(own, attempt, rounds=decided_rounds(str(run)))
        record_attempt(own, attempt, rounds=decided_rounds(str(run)))
    with pytest.raises(NoProgress, match="the last 3 attempts started before the first checkpoint"):
        require_progress(own, 9, rounds=decided_rounds(str(run)))


def test_the_cpu_target_makes_up_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.setenv(name, "before")
    monkeypatch.delenv(DEVICES_PER_HOST, raising=False)
    prepare_environment()
    assert os.environ["JAX_PLATFORMS"] == "before"
    monkeypatch.setenv(DEVICES_PER_HOST, "4")
    prepare_environment()
    assert (os.environ["JAX_PLATFORMS"], os.environ["JAX_NUM_CPU_DEVICES"]) == ("cpu", "4")


def test_a_run_directory_that_cannot_be_made_is_the_configs_fault(tmp_path: Path) -> None:
    require_directory(str(tmp_path / "runs/a"))
    require_directory("gs://bucket/runs/a")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/a"):
        with pytest.raises(ConfigError, match=f"run_directory: cannot be made: {path}: "):
            require_directory(str(path))


class JaxRuntimeError(Exception):
    """Known by its name, as JAX's own class is: this test imports no JAX."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (JaxRuntimeError("INTERNAL: Gloo all-reduce failed: [external/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (JaxRuntimeError("INTERNAL: [external/gloo/transport/tcp/pair.cc:446] Received data size doesn't match expected size"), True),
        (JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses"), True),
        (JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out. Id: init"), True),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 100 bytes"), False),
        (JaxRuntimeError("INVALID_ARGUMENT: shapes differ"), False),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (ValueError("connection closed by peer"), False),
        (KeyError("x"), False),
    ],
)
def test_the_loss_of_a_peer_is_told_from_an_error_of_our_own(error: Exception, expected: bool) -> None:
    assert lost_peer(error) is expected
    try:
        raise RuntimeError("while saving") from error
    except RuntimeError as wrapped:
        assert lost_peer(wrapped) is expected


def test_a_process_that_is_alone_has_no_peer_to_lose() -> None:
    code, words = unexpected(ConnectionResetError("Connection reset by peer"), 1)
    assert code == 76 and words == "the connection to storage failed, a restart may cure it: ConnectionResetError: Connection reset by peer"
    assert unexpected(JaxRuntimeError("UNAVAILABLE: the TPU is in use"), 1) == (70, "JaxRuntimeError: UNAVAILABLE: the TPU is in use")
    assert unexpected(JaxRuntimeError("UNAVAILABLE: heartbeat"), 2)[0] == 76
    assert unexpected(KeyError(), 1) == (70, "KeyError: ")


def test_who_ended_an_attempt_is_read_from_the_names_of_its_crash_bundles(tmp_path: Path) -> None:
    hosts = [(0, 0), (0, 1), (1, 0), (1, 1)]
    logs = tmp_path / "logs"
    logs.mkdir()
    assert how_it_ended(str(tmp_path), 0, hosts) == "", "a preemption leaves no bundle"
    for place in ("0.worker-0", "0.worker-1", "1.worker-0"):
        logs.joinpath(f"attempt-0.slice-{place}.exit-76.crash.json").write_text('{"cause": "lost a peer"}')
        logs.joinpath(f"attempt-1.slice-{place}.exit-76-00000.crash.json").write_text('{"cause": "lost a peer"}')
    assert how_it_ended(str(tmp_path), 0, hosts).startswith("slice 1, worker 1 ended without a word")
    logs.joinpath("attempt-1.slice-1.worker-1.exit-137-00000.crash.json").write_text('{"cause": "killed: out of memory"}')
    assert how_it_ended(str(tmp_path), 1, hosts) == "slice 1, worker 1 exited with 137: killed: out of memory"


def test_a_host_that_is_told_no_attempt_counts_its_own_logs(tmp_path: Path) -> None:
    def number(slice_index: int, worker: int) -> int:
        return after_its_last_log(str(tmp_path), slice_index, worker)

    assert number(1, 0) == 0
    for attempt, ending in ((0, ".log"), (9, "-00000.log"), (9, "-00001.log"), (10, "-00000.log"), (11, ".exit-76-00000.crash.json")):
        path = tmp_path / f"{log_stem(attempt, 1, 0)}{ending}"
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    assert (number(1, 0), number(0, 0), number(1, 1), number(1, 10)) == (11, 0, 0, 0)
    assert how_it_ended(str(tmp_path), 11, [(0, 0)]) == "", "another slice's end is not ours"
