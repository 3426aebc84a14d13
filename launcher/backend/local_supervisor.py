"""The supervisor of one local job: a process of its own, detached, that plays kubelet and controllers.

`python -m launcher.backend.local_supervisor FOLDER DESCRIPTOR CLAIM`; a byte on the descriptor says that it has begun,
and the claim is an open lock on the job's name, let go of when the supervisor's own lock is held.
It has one thread and one loop; SIGTERM ends the job.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from launcher.backend.local_jobset import LocalJobSet
from launcher.backend.local_pod import Names, PodProcess, pod_process
from launcher.backend.local_state import IDENTITY_ANNOTATION, JobFolder, Snapshot, end_pods, process_start
from launcher.backend.status import Manifest
from launcher.errors import Unavailable

START_FAILED: Final = 128
MESSAGE_BYTES: Final = 2048
PR_SET_PDEATHSIG: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36


class Supervisor:
    def __init__(self, folder: JobFolder) -> None:
        self.folder = folder
        submitted = folder.manifests()
        manifests: list[Manifest] = submitted["manifests"]
        self.directory = Path(submitted["directory"])
        self.config_maps: dict[str, dict[str, str]] = {
            manifest["metadata"]["name"]: manifest.get("data") or {} for manifest in manifests if manifest["kind"] == "ConfigMap"
        }
        jobset = next(manifest for manifest in manifests if manifest["kind"] == "JobSet")
        self.control = LocalJobSet(jobset, lambda: datetime.now(UTC))
        self.names = Names(jobset)
        self.running: dict[int, tuple[str, PodProcess]] = {}  # by process id
        self.kill_at: dict[int, float] = {}
        self.cancelled = False

    def run(self) -> None:
        """Until the job is finished or cancelled, and none of its processes is left."""
        with selectors.DefaultSelector() as selector:
            selector.register(_wakeups(), selectors.EVENT_READ)
            signal.signal(signal.SIGTERM, self._cancel)
            self._launch(self.control.start())
            while self.running or not (self.control.finished or self.cancelled):
                self._save()
                next_kill = min(self.kill_at.values(), default=None)
                for key, _ in selector.select(None if next_kill is None else max(0.0, next_kill - time.monotonic())):
                    os.read(key.fd, 4096)
                self._reap()
                self._end_doomed()
                if not self.cancelled:
                    self._launch(self.control.replacements())
                if self.control.recreate and not self.cancelled:
                    self.names.new_attempt()
                    self._launch(self.control.restart())
        self._save()

    def _cancel(self, *_: object) -> None:
        self.cancelled = True

    def _launch(self, pods: list[Manifest]) -> None:
        for pod in pods:
            name = pod["metadata"]["name"]
            place = self.folder.pods / name
            place.mkdir()
            try:
                process = pod_process(pod, place, self.config_maps, self.names, directory=self.directory, base=os.environ)
                with open(place / "log", "ab") as log:
                    # One thread, so that running Python between fork and exec is safe.
                    child = subprocess.Popen(
                        process.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=process.environment,
                        cwd=process.directory, start_new_session=True, preexec_fn=_end_with_supervisor,
                    )  # fmt: skip
            except (OSError, subprocess.SubprocessError, Unavailable) as error:
                self.control.pod_ended(name, START_FAILED, f"cannot start: {error}")
                continue
            self.running[child.pid] = (name, process)
            child.returncode = 0  # this loop collects it
            pod["metadata"]["annotations"][IDENTITY_ANNOTATION] = f"{child.pid} {process_start(child.pid)}"
            pod["spec"] = {**pod["spec"], "nodeName": f"pid {child.pid}"}  # what a user would look for on this machine
            self.control.pod_started(name)

    def _reap(self) -> None:
        """Collect every ended process; orphans of the pods come to this process too."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid not in self.running:
                continue
            name, process = self.running.pop(pid)
            self.kill_at.pop(pid, None)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            end_pods([self.control.pods[name]])  # a container's other processes end with its first
            code = os.waitstatus_to_exitcode(status)
            shutil.rmtree(self.folder.pods / name / "volumes", ignore_errors=True)
            self.control.pod_ended(name, 128 - code if code < 0 else code, self._last_words(name, process, code))

    def _last_words(self, name: str, process: PodProcess, code: int) -> str:
        """The termination message; after a failure without one, the end of the log."""
        with contextlib.suppress(OSError):
            return process.termination_log.read_bytes()[:MESSAGE_BYTES].decode(errors="replace").strip()
        if code == 0:
            return ""
        with open(self.folder.pods / name / "log", "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - MESSAGE_BYTES))
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""

    def _end_doomed(self) -> None:
        now = time.monotonic()
        doomed = set(self.control.doomed())
        for pid, (name, process) in self.running.items():
            if pid not in self.kill_at and (self.cancelled or name in doomed):
                self.kill_at[pid] = now + process.grace_seconds
                self.control.pod_leaving(name)
                os.kill(pid, signal.SIGTERM)
            elif self.kill_at.get(pid, now + 1) <= now:
                end_pods([self.control.pods[name]])

    def _save(self) -> None:
        control = self.control
        self.folder.write(Snapshot(control.jobset, control.jobs, list(control.pods.values()), control.events))


def _wakeups() -> int:
    """The read end of a pipe that becomes readable with every signal that has a handler."""
    read, write = os.pipe()
    for end in (read, write):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, _wake)
    return read


def _wake(*_: object) -> None:
    """The handler that makes a signal show in the pipe."""


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        _libc().prctl(option, value, 0, 0, 0)


def _libc() -> Any:
    import ctypes

    return ctypes.CDLL(None)


def _end_with_supervisor() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(folder: str, descriptor: str, claim: str) -> None:
    if os.fork():  # whoever called does not have to collect us
        os._exit(0)
    ready = int(descriptor)
    os.set_inheritable(ready, False)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    job = JobFolder(Path(folder))
    with job.supervised():
        os.close(int(claim))
        os.write(ready, b"1")
        os.close(ready)
        try:
            Supervisor(job).run()
        except BaseException:
            traceback.print_exc()
            raise


if __name__ == "__main__":
    main(*sys.argv[1:])
