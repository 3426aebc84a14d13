"""A step exists when its commit file says so and every listed file agrees."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.observe.saves import Save, last_save
from tests.trainer.checkpoint.states import abstract, differences, mesh, state
from trainer.checkpoint import Checkpoints
from trainer.checkpoint.commit import Commit, Damaged, committed_steps, decode, encode, inspect
from trainer.checkpoint.retention import steps_to_delete
from trainer.checkpoint.storage import File, checksum, open_storage
from trainer.config.run import Checkpoint
from trainer.errors import CheckpointError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with steps 10 and 20; tests copy it."""
    directory = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(Checkpoint(), str(directory))
    for step in (10, 20):
        checkpoints.save(step, state(step, mesh(8)), {"step": step})
    checkpoints.close()
    return directory


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints")
    return tmp_path


def files_of(run: Path, step: int) -> list[Path]:
    return sorted(path for path in (run / f"checkpoints/{step}").rglob("*") if path.is_file())


def opened(run: Path) -> Checkpoints:
    return Checkpoints(Checkpoint(), str(run))


def test_commit_files_are_read_without_jax(run: Path) -> None:
    program = (
        "import sys; from trainer.checkpoint.commit import committed_steps; print(committed_steps(sys.argv[1]), 'jax' in sys.modules,"
        " [m for m in ('numpy', 'pydantic', 'google.cloud') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", program, str(run)], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[10, 20] False []"


def test_a_commit_file_tells_how_long_the_save_took_and_one_without_that_counts_all_the_same(run: Path) -> None:
    storage = open_storage(str(run / "checkpoints"))
    commit = inspect(storage).commits[20]
    assert commit.save_seconds is not None and commit.save_seconds > 0
    assert last_save(str(run)) == Save(20, commit.save_seconds)
    storage.write("20/commit.json", encode(replace(commit, save_seconds=None)))
    assert last_save(str(run)) is None
    assert opened(run).latest_step() == 20
    assert inspect(storage).commits[20] == replace(commit, save_seconds=None)


def test_the_loss_of_any_single_file_hides_the_step_and_names_it(run: Path) -> None:
    for path in files_of(run, 20):
        content = path.read_bytes()
        path.unlink()
        checkpoints = opened(run)
        assert checkpoints.latest_step() == 10
        assert path.name in checkpoints.skipped[20]
        path.write_bytes(content)
    assert opened(run).latest_step() == 20


def test_a_cut_file_hides_the_step_with_both_sizes(run: Path) -> None:
    for path in files_of(run, 20):
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        checkpoints = opened(run)
        assert checkpoints.latest_step() == 10
        reason = checkpoints.skipped[20]
        assert path.name in reason
        assert path.name == "commit.json" or f"{len(content) - 1:,} bytes, {len(content):,} were written" in reason
        path.write_bytes(content)


@pytest.mark.parametrize("trials", [200, pytest.param(2000, marks=pytest.mark.full)])
def test_every_flipped_bit_is_found_before_it_is_used(run: Path, trials: int) -> None:
    """Orbax itself restores flipped array bytes without a word."""
    random_bits = random.Random(0)
    files = files_of(run, 20)
    storage = open_storage(str(run / "checkpoints"))
    for trial in range(trials):
        path = files[trial % len(files)]
        content = bytearray(path.read_bytes())
        position = random_bits.randrange(len(content) * 8)
        content[position // 8] ^= 1 << position % 8
        path.write_bytes(content)
        checkpoints = opened(run)
        assert checkpoints.latest_step() == 10, f"bit {position} of {path}"
        assert 20 in checkpoints.skipped
        content[position // 8] ^= 1 << position % 8
        path.write_bytes(content)
    assert inspect(storage).steps == [10, 20]


def test_restoring_a_damaged_step_by_name_is_refused(run: Path) -> None:
    path = next(path for path in files_of(run, 20) if path.parts[-3:-1] == ("ocdbt.process_0", "d"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step 20 .* cannot be restored: .* has CRC32C .* was written"):
        opened(run).restore(20, abstract(mesh(8)))


def test_of_a_step_only_what_is_asked_for_has_to_be_whole_and_is_read_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = next(path for path in files_of(run, 20) if "opt" in path.parts and path.parts[-3:-1] == ("ocdbt.process_0", "d"))
    path.write_bytes(bytes(len(path.read_bytes())))
    assert opened(run).latest_step() == 10
    checkpoints = opened(run)
    assert checkpoints.latest_step(("params",)) == 20
    monkeypatch.delattr("trainer.checkpoint.checkpoints.verify_contents")
    wanted = {"params": abstract(mesh(8))["params"]}
    assert set(checkpoints.restore(20, wanted)) == {"params"}


def test_a_damaged_step_moves_aside_and_its_number_is_saved_anew(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = files_of(run, 20)[3]
    for name in ("20", "20.1"):
        path.write_bytes(path.read_bytes()[:-1])
        checkpoints = opened(run)
        assert checkpoints.latest_step() == 10
        checkpoints.save(20, state(20, mesh(4, 2)), {})
        checkpoints.close()
        assert opened(run).latest_step() == 20
        assert inspect(open_storage(str(run / "checkpoints"))).quarantined >= {name}
        assert f"damaged checkpoint 20 of {run}/checkpoints moved to quarantine/{name}" in caplog.text
        path = files_of(run, 20)[3]
    assert "checkpoint 20 of" in caplog.text and "is not used" in caplog.text
    assert differences(opened(run).restore(20, abstract(mesh(8))), 20, mesh(8)) == []


def test_what_a_killed_save_left_is_skipped_and_then_deleted(run: Path) -> None:
    left = run / "checkpoints/30/params/ocdbt.process_0/d"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x" * 100)
    (run / "checkpoints/30/meta.json.77.tmp").write_bytes(b"{")
    checkpoints = opened(run)
    assert checkpoints.latest_step() == 20
    assert checkpoints.skipped == {30: "unfinished: commit.json is not there"}
    checkpoints.save(40, state(40, mesh(8)), {})
    checkpoints.close()
    assert not (run / "checkpoints/30").exists()
    assert committed_steps(str(run)) == [10, 20, 40]


def test_a_committed_step_of_others_is_never_overwritten(run: Path) -> None:
    with pytest.raises(CheckpointError, match="already holds a committed step 20 that this run did not start from"):
        opened(run).save(20, state(20, mesh(8)), {})


@pytest.mark.parametrize("name", ["10/default/checkpoint", "notes.txt", "10/_CHECKPOINT_METADATA", "010/params/x", "tmp/x"])
def test_a_directory_of_another_program_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "checkpoints" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(CheckpointError, match="holds files that this trainer did not write") as raised:
        opened(tmp_path).latest_step()
    assert "run_directory" in raised.value.hint
    assert path.read_text() == "mine"


def test_a_file_where_the_run_directory_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match="is not a directory"):
        opened(tmp_path / "run").latest_step()


def test_a_commit_file_that_is_not_ours_to_read_is_named(run: Path) -> None:
    storage = open_storage(str(run / "checkpoints"))
    document = json.loads(storage.read("20/commit.json"))
    broken = {
        "is not readable": b"\xff\xfe",
        "format 2": json.dumps({**document, "format": 2}).encode(),
        "does not match its own checksum": json.dumps({**document, "step": 21}).encode(),
        "belongs to step 10": storage.read("10/commit.json"),
    }
    for reason, data in broken.items():
        storage.write("20/commit.json", data)
        assert reason in inspect(storage).skipped[20]


def test_a_commit_file_is_created_once(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.write_new("10/commit.json", b"one")
    with pytest.raises(FileExistsError):
        storage.write_new("10/commit.json", b"two")
    assert storage.read("10/commit.json") == b"one"
    assert list(tmp_path.rglob("*.tmp")) == []


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
file_lists = st.dictionaries(names, st.builds(File, st.integers(0, 2**60), st.binary(max_size=8).map(checksum)))


@given(st.integers(0, 2**53), file_lists, st.none() | st.floats(0, 1e9))
def test_a_commit_file_says_what_was_put_into_it(step: int, files: dict[str, File], took: float | None) -> None:
    assert decode(encode(Commit(step, files, took))) == Commit(step, files, took)


@given(st.binary(max_size=200))
def test_no_bytes_at_all_make_reading_a_commit_file_fail_otherwise(data: bytes) -> None:
    with pytest.raises(Damaged):
        decode(data)


@given(st.sets(st.integers(0, 60)), st.integers(1, 5), st.none() | st.integers(1, 7))
def test_retention_keeps_the_newest_and_every_nth(steps: set[int], keep_last: int, keep_every: int | None) -> None:
    kept = {
        step for step in steps if sum(other > step for other in steps) < keep_last or (keep_every is not None and step % keep_every == 0)
    }
    deleted = steps_to_delete(steps, keep_last=keep_last, keep_every_steps=keep_every)
    assert deleted == sorted(steps - kept)


def test_old_steps_leave_and_every_nth_stays(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Checkpoint(keep_last=2, keep_every_steps=4), str(tmp_path))
    small = {name: dict(list(item.items())[-1:]) for name, item in state(0, mesh(1)).items()}
    for step in range(1, 8):
        checkpoints.save(step, small, {})
    checkpoints.close()
    assert committed_steps(str(tmp_path)) == [4, 6, 7]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "6", "7"]
