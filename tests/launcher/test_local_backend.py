"""The local backend with real processes: small programs in the trainer's place, the rendered JobSet otherwise."""

from __future__ import annotations

import getpass
import json
import os
import runpy
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launcher.backend import JobState
from launcher.backend.local import LocalBackend
from launcher.cli import main
from launcher.errors import AlreadyExists, NotFound, Unavailable
from launcher.image import own_revision
from launcher.observe.why import why
from tests.launcher.local_jobs import ENOUGH_SECONDS, container_of, document, exists, jobset_of, last, manifests, until
from trainer import contract

ATTEMPT = "import os, sys; attempt = int(os.environ['NNX_RESTART_ATTEMPT']); "
# Starts a process that leaves its session, then waits for a signal that it ignores or obeys.
DAEMON = """
import os, pathlib, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[2] == "stubborn" else lambda *_: sys.exit(75))
folder = sys.argv[1].removeprefix("folder:")  # in a pod, a word that begins with /tmp is the pod's own /tmp
hidden = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
pathlib.Path(folder, f"{os.environ['JOB_COMPLETION_INDEX']}.pids").write_text(f"{os.getpid()} {hidden.pid}")
while True:
    signal.pause()
"""


def command(*words: str) -> int:
    """Exit code of `nnxlaunch words...`."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0)


def pids(tmp_path: Path, hosts: int) -> list[int]:
    """Process ids the DAEMON programs have written down, two a host."""
    files = [tmp_path / f"{host}.pids" for host in range(hosts)]
    until(lambda: all(file.exists() and len(file.read_text().split()) == 2 for file in files), "the programs to start")
    return [int(pid) for file in files for pid in file.read_text().split()]


def test_a_process_finds_what_a_pod_would_find(backend: LocalBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNX_JOB_INDEX", "7")  # the shell's own values are not the pod's
    monkeypatch.setenv("HUB_TOKEN", "s3cret-value")
    program = "import json, os, sys; print(json.dumps([dict(os.environ), open(sys.argv[1]).read(), sys.argv[2]]))"
    changes = {"hosts": 2, "slices": 2, "env": {"HUB_TOKEN": {"secretKeyRef": {"name": "hub", "key": "token"}}}}
    rendered = manifests(tmp_path, program, "/etc/nnxlaunch/train.json", "$(NNX_COORDINATOR)", **changes)
    backend.create(rendered)
    assert last(backend).state is JobState.COMPLETED
    found = {(line.slice_index, line.worker): json.loads(line.text) for line in backend.logs("job")}
    assert sorted(found) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    coordinators = set()
    for (slice_index, worker), (environment, config, coordinator) in found.items():
        assert json.loads(config)["run_directory"] == str(tmp_path / "job")
        assert environment[contract.JOB_INDEX] == str(slice_index) and environment[contract.COMPLETION_INDEX] == str(worker)
        assert environment[contract.POD_NAME] == f"job-slice-{slice_index}-{worker}-a0" and environment[contract.POD_IP] == "127.0.0.1"
        assert environment[contract.IMAGE_REVISION] == own_revision()
        assert environment[contract.ATTEMPT] == "0" and environment["HUB_TOKEN"] == "s3cret-value"
        assert Path(environment["TMPDIR"]).is_relative_to(tmp_path / "state")
        assert coordinator == environment[contract.COORDINATOR]
        coordinators.add(coordinator)
    (coordinator,) = coordinators
    assert coordinator.startswith("127.0.0.1:") and coordinator != f"127.0.0.1:{contract.COORDINATOR_PORT}"
    written = [path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file() and path.name != "log"]
    assert not any(b"s3cret-value" in content for content in written)


def test_preemption_is_free_a_crash_is_counted_and_the_logs_of_all_attempts_can_be_followed(
    backend: LocalBackend, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = ATTEMPT + "print('attempt', attempt); sys.exit([75, 134, 0][attempt])"
    assert backend.create(manifests(tmp_path, program, hosts=2, failure={"max_restarts": 1})).attempt == 0
    followed = {(line.attempt, line.worker, line.text) for line in backend.logs("job", follow=True)}
    status = last(backend)
    assert (status.state, status.attempt, status.restarts_used, status.restarts_free) == (JobState.COMPLETED, 2, 1, 1)
    assert {(2, 0, "attempt 2"), (2, 1, "attempt 2")} <= followed and {attempt for attempt, _, _ in followed} == {0, 1, 2}
    restarts = [event.reason for event in backend.events("job") if event.reason.endswith("FailurePolicyAction")]
    assert restarts == ["RestartJobSetAndIgnoreMaxRestartsFailurePolicyAction", "RestartJobSetFailurePolicyAction"]
    kept = Path(backend.run_directory("job"), "logs")  # where a trainer would have kept them
    kept.mkdir(parents=True)
    (kept / "attempt-1.slice-0.worker-1.log").write_text("its last words\n")
    capsys.readouterr()
    assert command("logs", "job", "--previous") == 0
    assert capsys.readouterr().out == "[s0/w1 a1] its last words\n"
    assert command("logs", "job", "--grep", "attempt [02]", "--worker", "0") == 0
    # Worker 0 of the first attempt may have been told to leave before it came to speak.
    said = [attempt for attempt in (0, 2) if (attempt, 0, f"attempt {attempt}") in followed]
    assert capsys.readouterr().out == "".join(f"[s0/w0 a{attempt}] attempt {attempt}\n" for attempt in said)
    assert command("logs", "job", "--grep", "(") == command("logs", "job", "--slice", "1") == command("logs", "job", "--worker", "2") == 2
    assert "job has workers 0..1" in capsys.readouterr().err
    assert command("wait", "job") == 0


@pytest.mark.parametrize("code", (64, 70, 77))
def test_codes_that_no_restart_can_cure_are_never_restarted(backend: LocalBackend, tmp_path: Path, code: int) -> None:
    words = "pathlib.Path(os.environ['NNX_TERMINATION_LOG']).write_text('what went wrong')"
    backend.create(manifests(tmp_path, f"import os, pathlib, sys; {words}; sys.exit({code})", failure={"max_restarts": 5}))
    status = last(backend)
    assert (status.state, status.attempt) == (JobState.FAILED, 0)
    assert f"exited with {code} ({contract.MEANING[code]}): what went wrong" in status.message


def test_an_exhausted_budget_is_a_failure_with_its_cause(backend: LocalBackend, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backend.create(manifests(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", failure={"max_restarts": 1}))
    assert command("wait", "job", "--timeout", "1m") == 125
    assert "exited with 139 (segmentation fault)" in capsys.readouterr().err
    assert command("status", "job", "--output", "json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["state"], shown["reason"], shown["restarts_used"], shown["attempt"]) == ("failed", "ReachedMaxRestarts", 1, 1)
    assert (shown["cause"]["code"], shown["hosts_ready"]) == ("budget-used", 0)
    assert command("status", "job") == 0
    assert "1 of 1 restarts used" in capsys.readouterr().out
    assert command("status", "job", "--watch") == 0
    assert capsys.readouterr().out.startswith("job: failed, 0/1 hosts ready, attempt 1, slice 0, worker 0 exited with 139")
    assert command("why", "job") == 0
    assert "the restart budget (1) is used up after 1 counted restart [budget-used]" in capsys.readouterr().out
    assert command("describe", "job") == 0
    assert "counted  slice 0, worker 0 exited with 139 (segmentation fault)" in capsys.readouterr().out
    assert command("events", "job", "-o", "json") == 0
    assert json.loads(capsys.readouterr().out)[-1]["warning"]
    assert command("list", "-o", "wide", "--mine", "--state", "failed") == 0
    assert getpass.getuser() in capsys.readouterr().out.splitlines()[1]
    assert command("list", "--state", "running") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_cancel_leaves_no_process_not_even_one_that_left_its_session(backend: LocalBackend, tmp_path: Path) -> None:
    backend.create(manifests(tmp_path, DAEMON, f"folder:{tmp_path}", "obedient", hosts=2, grace_seconds=30))
    running = pids(tmp_path, 2)
    assert command("wait", "job", "--timeout", "0.2s") == 124
    assert command("cancel", "job") == 0
    assert [pid for pid in running if exists(pid)] == []
    assert command("status", "job") == NotFound.exit_code
    assert command("wait", "job") == 1


def test_a_process_that_ignores_sigterm_is_killed_when_its_grace_is_over(backend: LocalBackend, tmp_path: Path) -> None:
    backend.create(manifests(tmp_path, DAEMON, f"folder:{tmp_path}", "stubborn", hosts=2, grace_seconds=1, failure={"max_restarts": 0}))
    first, hidden, second, other = pids(tmp_path, 2)
    os.kill(first, signal.SIGKILL)
    status = last(backend)
    assert status.state is JobState.FAILED and "worker 0 exited with 137" in status.message
    assert status.pods[1].exit_code == 137
    assert [pid for pid in (first, hidden, second, other) if exists(pid)] == []


def test_a_killed_supervisor_is_reported_and_its_processes_end(backend: LocalBackend, tmp_path: Path) -> None:
    backend.create(manifests(tmp_path, DAEMON, f"folder:{tmp_path}", "stubborn", hosts=2))
    running = pids(tmp_path, 2)
    supervisor = json.loads((tmp_path / "state/default/job/supervisor.json").read_text())["pid"]
    os.kill(supervisor, signal.SIGKILL)
    status = last(backend)
    assert (status.state, status.reason, status.ready) == (JobState.FAILED, "SupervisorLost", 0)
    told = why(backend.scene("job"))
    assert told.code == "supervisor-lost" and f"its supervisor, process {supervisor}, was killed" in told.sentence
    assert "wrote last at 20" in told.sentence and "supervisor.log" not in told.sentence, "that log is empty"
    assert told.fix.startswith("nnxlaunch submit SPEC --replace: ") and told.evidence
    assert [event.reason for event in backend.events("job")] == ["Started", "SupervisorLost"]
    until(lambda: not any(exists(pid) for pid in running[::2]), "the processes to end with their parent")
    assert [found.state for found in backend.list()] == [JobState.FAILED]
    assert all(exists(pid) for pid in running[1::2])  # what left its session; looking at a job kills nothing
    backend.delete("job")
    until(lambda: not any(exists(pid) for pid in running), "all processes to end")


def test_a_job_that_starts_is_never_failed_and_can_be_cancelled(backend: LocalBackend, tmp_path: Path) -> None:
    rendered = manifests(tmp_path, "import signal; signal.pause()")
    with ThreadPoolExecutor() as others:
        submit = others.submit(backend.create, rendered)
        until(lambda: submit.done() or backend.list(), "the job to be there")
        seen = [status for status in backend.list() if status.state is not JobState.PENDING]
        cancel = others.submit(backend.delete, "job")
        until(lambda: submit.done() and cancel.done(), "both commands to end")
        assert [status for status in seen if status.state is JobState.FAILED] == []
        assert submit.result().state in (JobState.PENDING, JobState.RUNNING) and cancel.result() is None
    assert backend.list() == []


def test_an_interrupted_submit_is_completed_by_the_same_one_again(
    backend: LocalBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = manifests(tmp_path, "pass")
    for without_status in (False, True):  # an older version made the folder before its status
        with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
            killed.setattr(LocalBackend, "_supervise", _killed)
            backend.create(rendered)
        if without_status:
            (tmp_path / "state/default/job/status.json").unlink()
        assert [status.state for status in backend.list()] == [JobState.FAILED]
        assert why(backend.scene("job")).code == ("failed" if without_status else "submit-interrupted")
    backend.create(rendered)
    assert last(backend).state is JobState.COMPLETED


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_of_two_replacements_at_once_both_run_one_after_the_other(backend: LocalBackend, tmp_path: Path) -> None:
    words = ("first", "second")
    rendered = [manifests(tmp_path, "import signal; signal.pause()", word) for word in words]
    with ThreadPoolExecutor() as others:
        submits = [others.submit(backend.create, one, replace=True) for one in rendered]
        states = [submit.result(ENOUGH_SECONDS).state for submit in submits]
    assert set(states) <= {JobState.PENDING, JobState.RUNNING}
    (status,) = backend.list()
    assert status.state in (JobState.PENDING, JobState.RUNNING) and status.attempt == 0
    backend.delete("job")
    assert backend.list() == []


def test_a_damaged_record_hides_no_other_job_and_can_be_cancelled(
    backend: LocalBackend, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend.create(manifests(tmp_path, "pass"))
    last(backend)
    (tmp_path / "state/default/torn").mkdir()
    (tmp_path / "state/default/torn/status.json").write_text('{"jobset": {"metad')
    assert [(status.name, status.state, status.reason) for status in backend.list()] == [
        ("job", JobState.COMPLETED, "AllJobsCompleted"), ("torn", JobState.FAILED, "Damaged"),
    ]  # fmt: skip
    for words in (("status", "torn"), ("why", "torn"), ("describe", "torn"), ("events", "torn"), ("logs", "torn"), ("cancel", "torn")):
        assert command(*words) == 0, words
    assert "is damaged" in capsys.readouterr().out
    assert [status.name for status in backend.list()] == ["job"]


def test_a_taken_name_is_refused_and_replace_waits_for_the_old_job(backend: LocalBackend, tmp_path: Path) -> None:
    backend.create(manifests(tmp_path, DAEMON, f"folder:{tmp_path}", "obedient"))
    old = pids(tmp_path, 1)
    with pytest.raises(AlreadyExists, match="job 'job' exists already") as taken:
        backend.create(manifests(tmp_path, "pass"))
    assert "--attach" in taken.value.hint and "--replace" in taken.value.hint
    assert all(exists(pid) for pid in old)
    backend.create(manifests(tmp_path, "pass"), replace=True)
    assert not any(exists(pid) for pid in old)
    assert last(backend).state is JobState.COMPLETED
    with pytest.raises(AlreadyExists) as taken:
        backend.create(manifests(tmp_path, "pass"))
    assert "--attach" not in taken.value.hint and "--replace" in taken.value.hint, "there is nothing left to follow"


def test_the_quickstart_touches_no_job_of_another_clone(
    backend: LocalBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backend.create(manifests(tmp_path, "import signal; signal.pause()", name="quickstart"))
    clone = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", str(clone))
    (tmp_path / "clone").mkdir()
    monkeypatch.chdir(tmp_path / "clone")
    assert runpy.run_path(str(clone / "docs/quickstart.py"))["main"]() == 1
    assert f"runs in {tmp_path / 'quickstart'}\nhint: " in capsys.readouterr().err
    assert not backend.get("quickstart").state.finished


def test_a_finished_job_is_forgotten_after_its_time(backend: LocalBackend, tmp_path: Path) -> None:
    backend.create(manifests(tmp_path, "pass", ttl_seconds=0))
    until(lambda: backend.list() == [], "the finished job to be forgotten")


def test_what_this_machine_cannot_run_is_said_before_anything_starts(
    backend: LocalBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HUB_TOKEN", raising=False)
    tpu = manifests(tmp_path, "pass")
    container_of(tpu)["resources"] = {"limits": {"google.com/tpu": 4}}
    volume = manifests(tmp_path, "pass", volumes=[{"type": "pvc", "claim": "disk", "mount_path": "/data"}])
    secret = manifests(tmp_path, "pass", env={"HUB_TOKEN": {"secretKeyRef": {"name": "hub", "key": "token"}}})
    waiting = manifests(tmp_path, "pass")
    jobset_of(waiting)["spec"]["replicatedJobs"][0]["dependsOn"] = [{"name": "other", "status": "Ready"}]
    expected = {"TPU chips": tpu, "persistentVolumeClaim": volume, "Secret 'hub'": secret, "dependsOn": waiting}
    for words, rendered in expected.items():
        with pytest.raises(Unavailable, match=words):
            backend.create(rendered)
    assert backend.list() == []


def test_a_command_that_does_not_exist_is_a_failure_with_its_cause(backend: LocalBackend, tmp_path: Path) -> None:
    rendered = manifests(tmp_path, "")
    container_of(rendered)["command"] = ["no-such-program"]
    backend.create(rendered)
    status = last(backend)
    assert status.state is JobState.FAILED and "exited with 128" in status.message and "no-such-program" in status.message


def test_a_refused_spec_creates_nothing(backend: LocalBackend, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "job.yaml"
    spec.write_text(json.dumps(document(tmp_path)))
    assert command("submit", str(spec), "--set", "train.steps=-1") == 64
    assert "train.steps" in capsys.readouterr().err
    assert command("status", "job") == NotFound.exit_code
    assert command("list") == 0 and backend.list() == []
    assert capsys.readouterr().out == "no jobs in namespace default\n"
