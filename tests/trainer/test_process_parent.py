"""The parent process: signals, exit codes, evidence, output; as a plain process and as PID 1 of a namespace."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.namespaces import pid_namespace
from tests.trainer.parent_program import GLOO_DIED, PEER_DIED
from trainer.contract import FREE_EXIT_CODES, GRACE_SECONDS, HINT, TERMINATION_LOG
from trainer.parent.evidence import REMOVED, redact, without_secrets, write_termination_message
from trainer.parent.verdict import Ending, Verdict, verdict

ROOT = Path(__file__).resolve().parents[2]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the program in a mode; whatever is left is killed in the end."""
    running: list[subprocess.Popen[str]] = []

    def run(mode: str, file: object = "", *, prefix: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.trainer.parent_program", mode, str(file)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, TERMINATION_LOG: str(tmp_path / "termination-log"), **environment},
        )  # fmt: skip
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def parent_of(process: subprocess.Popen[str], prefix: tuple[str, ...]) -> int:
    """The parent's process id, seen from here."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]) if prefix else process.pid


@pytest.mark.parametrize(
    ("ending", "code", "survivor"),
    [
        (Ending(status=0), 0, False),
        (Ending(status=64), 64, False),
        (Ending(status=1), 1, False),
        (Ending(status=-signal.SIGKILL), 137, False),
        (Ending(status=-signal.SIGABRT, tail="RESOURCE_EXHAUSTED"), 134, False),
        (Ending(status=-signal.SIGSEGV), 139, False),
        (Ending(status=-signal.SIGTERM), 143, False),
        (Ending(status=-signal.SIGABRT, tail=PEER_DIED), 76, True),
        (Ending(status=-signal.SIGSEGV, tail=PEER_DIED), 76, True),
        (Ending(status=-signal.SIGABRT, tail=GLOO_DIED, processes=2), 76, True),
        (Ending(status=-signal.SIGABRT, tail="INTERNAL: Gloo all-reduce failed: Connection reset", processes=2), 76, True),
        (Ending(status=-signal.SIGSEGV, tail="[pair.cc:547] Connection closed by peer [127.0.0.1]:2", processes=2), 76, True),
        (Ending(status=-signal.SIGABRT, tail=GLOO_DIED), 134, False),
        (Ending(status=-signal.SIGABRT, tail="one of its own", processes=2), 134, False),
        (Ending(status=76), 76, False),
        (Ending(status=-signal.SIGABRT, announced=76, processes=2), 76, True),
        (Ending(status=76, announced=76), 76, False),
        (Ending(status=-signal.SIGABRT, announced=0), 0, False),
        (Ending(status=-signal.SIGABRT, announced=75, tail=PEER_DIED), 75, False),
        (Ending(status=-signal.SIGKILL, announced=75, killed="teardown"), 75, False),
        (Ending(status=-signal.SIGKILL, killed="nothing unsaved"), 75, False),
        (Ending(status=-signal.SIGTERM, asked=True), 75, False),
        (Ending(status=-signal.SIGTERM, asked=True, phase="training"), 143, False),
        (Ending(status=-signal.SIGKILL, killed="second signal", phase="training"), 143, False),
        (Ending(status=-signal.SIGKILL, killed="grace expired", phase="training"), 143, False),
    ],
)
def test_how_the_child_ended_gives_the_exit_code(ending: Ending, code: int, survivor: bool) -> None:
    found = verdict(ending)
    assert (found.code, found.survivor) == (code, survivor)
    assert found.cause or code == 0


def test_the_silent_task_and_the_memory_limit_are_named() -> None:
    tail = (
        f"{PEER_DIED} absl::Status: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n3\nThe tasks have crashed"
    )
    assert verdict(Ending(status=-6, tail=tail)).cause.startswith("task 3 stopped sending heartbeats")
    assert verdict(Ending(status=-9, out_of_memory=True)) == Verdict(code=137, cause="killed: out of memory")


@pytest.mark.parametrize("namespace", (False, True), ids=("process", "pid-1"))
def test_sigterm_reaches_the_child_at_once_and_its_announced_exit_code_survives_its_crash(
    start: Start, tmp_path: Path, namespace: bool
) -> None:
    prefix = pid_namespace() if namespace else ()
    delays: list[float] = []
    while len(delays) < 5 and min(delays, default=1.0) > 0.05:  # the machine may be busy; the parent must not be
        process = start("training", tmp_path / "log", prefix=prefix)
        assert line(process) == "started"
        sent = time.monotonic()
        os.kill(parent_of(process, prefix), signal.SIGTERM)
        _, errors = process.communicate()
        assert process.returncode == 75
        asked = re.search(r"exit code 75: asked at ([\d.]+)", errors)
        assert asked is not None
        delays.append(float(asked[1]) - sent)
    assert min(delays) <= 0.05


@pytest.mark.parametrize("namespace", (False, True), ids=("process", "pid-1"))
def test_before_training_sigterm_ends_even_a_deaf_child_at_once_with_75(start: Start, namespace: bool) -> None:
    prefix = pid_namespace() if namespace else ()
    process = start("compiling", prefix=prefix)
    assert line(process) == "started"
    os.kill(parent_of(process, prefix), signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 75
    assert "nothing was unsaved" in errors


def test_a_second_sigterm_ends_training_at_once(start: Start, tmp_path: Path) -> None:
    process = start("forever", tmp_path / "log")
    assert line(process) == "started"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 143 and "asked to leave twice" in errors


def test_an_expired_grace_ends_training_and_leaves_its_stacks(start: Start, tmp_path: Path) -> None:
    process = start("forever", tmp_path / "run.log", **{GRACE_SECONDS: "1"})
    assert line(process) == "started"
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143
    bundle = json.loads((tmp_path / "run.exit-143.crash.json").read_text())
    assert (bundle["exit_code"], bundle["phase"], bundle["step"]) == (143, "training", 41)
    assert any("parent_program.py" in frame and "in child" in frame for frame in bundle["stacks"])
    assert (tmp_path / "termination-log").read_text() == "asked to leave; the grace ended before it could save"


def test_a_process_with_the_cause_ends_at_once_and_leaves_its_stack(start: Start, tmp_path: Path) -> None:
    process = start("abort")
    began = time.monotonic()
    _, errors = process.communicate()
    assert process.returncode == 134 and time.monotonic() - began < 8
    assert "Fatal Python error: Aborted" in errors and "parent_program.py" in errors
    assert (tmp_path / "termination-log").read_text() == "ended by SIGABRT during startup"


@pytest.mark.parametrize("mode", ("peer", "gloo"))
def test_a_survivor_of_a_dead_peer_lets_the_cause_be_seen_first_unless_it_is_asked_to_leave(
    start: Start, tmp_path: Path, mode: str
) -> None:
    process = start(mode)
    assert process.stderr is not None
    shown = ""
    while "exit code 76" not in shown:
        shown += process.stderr.readline()
    (bundle,) = tmp_path.glob("*crash*.json")
    assert "Fatal Python error" not in shown and "Fatal Python error: Aborted" in json.loads(bundle.read_text())["stacks"]
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=5)
    assert process.returncode == 76


@pytest.mark.parametrize("code", (1, 2, 64, 70, 77))
def test_other_exit_codes_pass_through_with_the_last_line_as_the_cause(start: Start, tmp_path: Path, code: int) -> None:
    process = start("code", code)
    process.communicate()
    assert process.returncode == code
    assert (tmp_path / "termination-log").read_text() == "last words"


def test_a_sigterm_while_the_parent_shuts_down_does_not_replace_the_exit_code(start: Start) -> None:
    process = start("shutdown", 77)
    process.communicate()
    assert process.returncode == 77


def test_a_child_that_hangs_after_its_announcement_does_not_hold_up_a_sigterm_twice(start: Start) -> None:
    process = start("said", 0)
    assert line(process) == "started"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 0


def test_output_is_passed_on_and_kept_in_the_log_file_and_no_secret_reaches_the_evidence(start: Start, tmp_path: Path) -> None:
    process = start("log", tmp_path / "logs/run.log", HUB_TOKEN="canary-1234567890")
    out, errors = process.communicate()
    assert process.returncode == 70
    assert "before the log file is known\nafter it is known\n" in out and "on stderr\n" in errors
    kept = (tmp_path / "logs/run.log").read_text()
    assert "before the log file is known\n" in kept and "after it is known\n" in kept and "on stderr\n" in kept and "exit code 70" in kept
    bundle = tmp_path / "logs/run.exit-70.crash.json"
    content = bundle.read_text()
    assert "canary-1234567890" not in content and "user:pass" not in content
    assert json.loads(content)["environment"]["HUB_TOKEN"] == REMOVED
    assert bundle.stat().st_mode & 0o077 == 0


def test_a_log_file_that_an_earlier_start_has_left_goes_on_below_a_line_that_says_so(start: Start, tmp_path: Path) -> None:
    for _ in range(3):
        start("log", tmp_path / "run.log").communicate()
    first, *later = re.split(r"(?m)^---- 20\S+\+00:00: started again; .*\n", (tmp_path / "run.log").read_text())
    assert [kept.splitlines()[0] for kept in (first, *later)] == ["before the log file is known"] * 3
    assert [kept.count("after it is known") for kept in (first, *later)] == [1] * 3


def test_a_child_does_not_outlive_its_killed_parent(start: Start, tmp_path: Path) -> None:
    process = start("training", tmp_path / "log")
    assert line(process) == "started"
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.communicate()  # both ends of the child's output are closed only when it is gone
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < deadline


def test_as_pid_1_it_collects_the_orphans_of_others(start: Start, tmp_path: Path) -> None:
    prefix = pid_namespace()
    process = start("orphan", tmp_path / "done", prefix=prefix)
    deadline = time.monotonic() + 30
    while not (tmp_path / "done").exists():
        assert time.monotonic() < deadline
    parent = parent_of(process, prefix)
    children = Path(f"/proc/{parent}/task/{parent}/children")
    while len(children.read_text().split()) > 1:  # the orphan ends by itself; a zombie would stay
        assert time.monotonic() < deadline
    os.kill(parent, signal.SIGTERM)
    process.communicate()
    assert process.returncode in FREE_EXIT_CODES


@pytest.mark.parametrize(
    ("environment", "kept"),
    [({"JAX_PLATFORMS": "cpu"}, True), ({"JAX_PLATFORMS": ""}, False), ({"JAX_PLATFORMS": "cpu", "MALLOC_MMAP_MAX_": "65536"}, False)],
    ids=["cpu", "other devices", "set by the user"],
)
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="only glibc is told how to keep memory")
def test_on_cpu_a_trainer_keeps_its_memory_from_step_to_step(start: Start, environment: dict[str, str], kept: bool) -> None:
    _, *later = map(int, start("memory", **environment).communicate()[0].split())
    pages = (64 << 20) // mmap.PAGESIZE
    assert all(count < pages // 10 for count in later) if kept else all(count >= pages for count in later)


def test_the_parent_imports_the_standard_library_alone() -> None:
    program = "import sys, trainer.__main__, trainer.parent.process; print('\\n'.join(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    foreign = {name.partition(".")[0] for name in found} - sys.stdlib_module_names - {"trainer", "__main__"}
    assert {name for name in foreign if not name.startswith(("_", "a1_", "sitecustomize"))} == set()


@pytest.mark.parametrize(
    ("cause", "hint", "kept"), [("a wörd", "h" * 1500, True), ("ö" * 3000, "h" * 900, True), ("ö" * 3000, "h" * 1500, False)]
)
def test_a_long_cause_gives_way_to_the_hint_unless_that_leaves_it_no_room(tmp_path: Path, cause: str, hint: str, kept: bool) -> None:
    write_termination_message(f"{cause}\n{HINT}{hint}", {TERMINATION_LOG: str(tmp_path / "log")})
    said = (tmp_path / "log").read_text()
    assert len(said.encode()) <= 2000 and said.startswith(cause[:500])
    assert said.endswith(f"\n{HINT}{hint}") is kept and (HINT in said) is kept


def test_credentials_are_recognised_by_name_and_by_look() -> None:
    environment = {"API_KEY": "abcdefgh", "PATH": "/bin", "PROXY": "http://me:word@proxy:1", "KEYBOARD": "de", "NOTE": "hf_" + "a" * 30}
    shown = without_secrets(environment)
    assert shown["API_KEY"] == REMOVED and shown["PATH"] == "/bin" and shown["KEYBOARD"] == "de"
    assert "word" not in shown["PROXY"] and shown["NOTE"] == REMOVED
    text = redact("token abcdefgh, key -----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", environment)
    assert "abcdefgh" not in text and "MIIE" not in text
