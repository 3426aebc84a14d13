"""A grace is held against the time that the run's last save has taken."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from launcher.checks import problems_in
from launcher.checks.pod import grace_fits_save, save_outlasts_capacity
from launcher.observe import saves
from launcher.observe.saves import Save, asked_for_last_save, last_save
from tests.gcs_emulator import gcs_emulator
from tests.launcher.regenerate import EXAMPLES
from tests.launcher.test_cli import QUICKSTART, run
from trainer.checkpoint.commit import COMMIT_FILE, Commit, checkpoint_directory, encode
from trainer.checkpoint.storage import open_storage


def commit(run_directory: str, step: int, seconds: float | None) -> None:
    open_storage(checkpoint_directory(run_directory)).write(f"{step}/{COMMIT_FILE}", encode(Commit(step, {}, seconds)))


def test_the_newest_committed_step_counts_and_what_cannot_be_read_is_no_time(tmp_path: Path) -> None:
    directory = str(tmp_path)
    assert last_save(directory) is None
    commit(directory, 9, 1.5)
    commit(directory, 10, 2.5)
    (tmp_path / "checkpoints/11/params").mkdir(parents=True)  # not committed yet
    (tmp_path / "checkpoints/quarantine").mkdir()
    assert last_save(directory) == Save(10, 2.5) == asked_for_last_save(directory)()
    for content in ("[]", "{", json.dumps({"save_seconds": "long"}), json.dumps({"save_seconds": float("nan")})):
        (tmp_path / "checkpoints/10/commit.json").write_text(content)
        assert last_save(directory) is None
    assert last_save(f"{directory}/nothing") is None and last_save("gs://bucket/run") is None


def test_a_bucket_tells_the_same_and_is_not_waited_for_when_it_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with gcs_emulator() as gcs:
        for name, value in gcs.environment.items():
            monkeypatch.setenv(name, value)
        directory = f"{gcs.url}/runs/a"
        assert asked_for_last_save(directory)() is None
        for step, seconds in ((9, 1.5), (10, 2.5)):
            commit(directory, step, seconds)
        open_storage(checkpoint_directory(directory)).write("11/params/x", b"not committed yet")
        assert asked_for_last_save(directory)() == asked_for_last_save(f"{directory}/")() == Save(10, 2.5)
        assert asked_for_last_save("gs://no-such-bucket/runs/a")() is None
    assert asked_for_last_save(directory)() is None, "nobody listens there any more"
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/key.json")
    assert asked_for_last_save(directory)() is None, "nobody is logged in"
    with monkeypatch.context() as patient:
        patient.setattr(saves, "PATIENCE_SECONDS", 0.0)
        patient.setattr(saves, "_in_bucket", lambda _: threading.Event().wait())
        assert asked_for_last_save(directory)() is None


@pytest.mark.parametrize(
    ("example", "overrides", "seconds", "found", "noted"),
    [
        ("quickstart", (), 110.0, None, False),
        ("quickstart", (), 110.1, (120, 121, "grace_seconds: 121"), False),
        ("quickstart", ("grace_seconds=20",), 10.5, (20, 21, "grace_seconds: 21"), False),
        ("quickstart", ("grace_seconds=3600",), 3591.0, (3600, 3601, "leave it out"), False),
        ("v5p-128-spot", (), 15.0, None, False),
        ("v5p-128-spot", (), 19.5, (25, 30, "grace_seconds: 30"), False),
        ("v5p-128-spot", (), 60.0, None, True),
        ("v5p-128-spot", ("grace_seconds=25",), 60.0, (25, 70, "leave it out"), False),
    ],
)
def test_a_grace_must_be_as_long_as_a_save_and_a_survivors_wait_where_the_capacity_gives_as_much(
    example: str, overrides: tuple[str, ...], seconds: float, found: tuple[int, int, str] | None, noted: bool
) -> None:
    spec, problems = problems_in(EXAMPLES / f"{example}.job.yaml", overrides)
    assert spec and not problems
    told = list(grace_fits_save(spec, step=10, seconds=seconds))
    assert [(p.path, p.code, p.value, p.limit, p.hint.startswith(found[2])) for p in told if found] == (
        [("grace_seconds", "grace-save", found[0], found[1], True)] if found else []
    )
    assert len(told) == bool(found)
    assert ("checkpoint.every_steps" in save_outlasts_capacity(spec, step=10, seconds=seconds)) is noted


def test_commands_refuse_a_grace_that_the_last_save_outlasts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    commit(str(tmp_path / "quickstart"), 10, 115.25)
    there = ("--set", f"directory={tmp_path}")
    for words in (("validate",), ("explain",), ("submit", "--backend", "local"), ("submit", "--attach", "--backend", "local")):
        assert run(words[0], QUICKSTART, *there, *words[1:]) == 64
        captured = capsys.readouterr()
        assert "error: grace_seconds: 120 s, but the save of step 10 took 115.2 s" in captured.err and "[grace-save]" in captured.err
        assert "hint: grace_seconds: 126" in captured.err and captured.out == ""
    assert run("list", "--backend", "local", "--output", "json") == 0
    assert json.loads(capsys.readouterr().out) == []
    assert run("validate", QUICKSTART, *there, "--output", "json") == 64
    (problem,) = json.loads(capsys.readouterr().out)
    assert (problem["path"], problem["value"], problem["limit"], problem["code"]) == ("grace_seconds", 120, 126, "grace-save")
    assert run("explain", QUICKSTART, *there, "--set", "grace_seconds=126", "--output", "json") == 0
    assert json.loads(capsys.readouterr().out)["timeouts"]["last_save_seconds"] == 115.25
