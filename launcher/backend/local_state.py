"""The folder of a local job: what it was made of, what it is doing, its logs.

<state>/<namespace>/.<name>.lock    held while the job is made or removed; it outlives the folder, so that two never do it at once
<state>/<namespace>/<name>/
  manifests.json    as submitted, and where
  status.json       JobSet, Jobs, pods and events; replaced whole, after the start by the supervisor alone
  lock              held by the supervisor as long as it lives: the kernel lets go of it however it dies
  supervisor.json   its process id
  supervisor.log
  pods/<pod>/log    output of one pod; pods of earlier attempts stay until the job is cancelled
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from launcher.backend.local_pod import descendants
from launcher.backend.status import RESTART_ATTEMPT_LABEL, Event, JobStatus, Manifest, job_status, timestamp
from launcher.backend.values import mapping
from launcher.errors import NotFound, Unavailable

STATE_VARIABLE: Final = "NNXLAUNCH_STATE"
LOOK_SECONDS: Final = 0.1
IDENTITY_ANNOTATION: Final = "nnxlaunch/local-process"
"""On a pod: process id and start of its main process."""


def state_root() -> Path:
    chosen = os.environ.get(STATE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base, "nnxlaunch")


@dataclass(frozen=True)
class Snapshot:
    """One reading of status.json."""

    jobset: Manifest
    jobs: list[Manifest]
    pods: list[Manifest]  # of all attempts
    events: list[Event]

    @property
    def finished(self) -> bool:
        return "terminalState" in self.jobset["status"]

    @property
    def present(self) -> list[Manifest]:
        """The pods a cluster would still have."""
        attempt = str(self.jobset["status"]["restarts"])
        return [p for p in self.pods if p["metadata"]["labels"][RESTART_ATTEMPT_LABEL] == attempt or _alive(p)]

    @property
    def status(self) -> JobStatus:
        return job_status(self.jobset, self.present, self.jobs)

    @property
    def document(self) -> dict[str, Any]:
        """What status.json holds."""
        events = [{**asdict(event), "at": event.at.isoformat() if event.at else None} for event in self.events]
        return {"jobset": self.jobset, "jobs": self.jobs, "pods": self.pods, "events": events}


@dataclass(frozen=True)
class JobFolder:
    path: Path

    @property
    def pods(self) -> Path:
        return self.path / "pods"

    def read(self) -> Snapshot:
        """A status that cannot be read is a failed job that says so, and that can be removed. Raises NotFound when the job is gone."""
        try:
            document = json.loads((self.path / "status.json").read_bytes())
        except (FileNotFoundError, ValueError) as error:
            if not self.path.is_dir():
                raise self._not_found() from None
            return self._damaged(error)
        events = [Event(at=timestamp(raw.pop("at")), **raw) for raw in document["events"]]
        return Snapshot(document["jobset"], document["jobs"], document["pods"], events)

    def write(self, snapshot: Snapshot) -> None:
        _replace(self.path / "status.json", snapshot.document)

    def manifests(self) -> dict[str, Any]:
        return self._json("manifests.json")

    @contextlib.contextmanager
    def claimed(self, *, wait: bool = True) -> Generator[int]:
        """Hold the name, to make or to remove its job; gives the lock's descriptor.

        A process that inherits the descriptor holds the name too, until it closes it. Raises BlockingIOError when another
        holds the name and `wait` is false, and Unavailable when the folder of this machine's jobs cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self._name_lock, "ab")
        except OSError as error:
            raise Unavailable(
                f"the folder of this machine's jobs, {self.path.parent}, cannot be written: {error.strerror}",
                hint=f"set {STATE_VARIABLE} to a folder that can",
            ) from None
        with file:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield file.fileno()

    def busy(self) -> bool:
        """Whether the job has a supervisor, or is being started or removed.

        A supervisor lets go of the name only once it holds its own lock: asked in this order, no start is missed.
        """
        return _locked(self._name_lock) or _locked(self.path / "lock")

    @property
    def begun(self) -> bool:
        """Whether it ever had a supervisor."""
        return (self.path / "supervisor.json").exists()

    @property
    def supervisor_lives(self) -> bool:
        """Of a job that is neither being started nor removed, this is whether it goes on."""
        return _locked(self.path / "lock")

    @property
    def supervisor_pid(self) -> int:
        """Of the one that it has or had."""
        return int(self._json("supervisor.json")["pid"])

    @contextlib.contextmanager
    def supervised(self) -> Generator[None]:
        """Hold the lock of a supervisor.

        Whoever starts one holds the name, and there is one folder for one supervisor: this waits for readers of the lock alone.
        """
        with open(self.path / "lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            _replace(self.path / "supervisor.json", {"pid": os.getpid()})
            yield

    def stop(self, patience_seconds: float) -> None:
        """Ask the supervisor to end the job, wait for it, and end what is left by force."""
        pid = self._supervisor()
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + patience_seconds
            while _locked(self.path / "lock") and time.monotonic() < deadline:
                time.sleep(LOOK_SECONDS / 2)
            if _locked(self.path / "lock"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(NotFound):
            end_pods(self.read().pods)

    def remove(self) -> None:
        """Take the name away first, then the files."""
        grave = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, grave)
            shutil.rmtree(grave, ignore_errors=True)

    def expired(self) -> bool:
        """Finished longer ago than its `ttlSecondsAfterFinished`."""
        snapshot = self.read()
        ttl, finished_at = snapshot.jobset["spec"].get("ttlSecondsAfterFinished"), snapshot.status.finished_at
        return ttl is not None and finished_at is not None and datetime.now(UTC) > finished_at + timedelta(seconds=ttl)

    @property
    def _name_lock(self) -> Path:
        return self.path.with_name(f".{self.path.name}.lock")

    def _supervisor(self) -> int | None:
        """Its process id while it lives."""
        if not self.supervisor_lives:
            return None
        with contextlib.suppress(NotFound, ValueError):
            return self.supervisor_pid
        return None

    def _damaged(self, error: Exception) -> Snapshot:
        name = self.path.name
        failed = {
            "type": "Failed", "status": "True", "reason": "Damaged",
            "message": f"the record of this job is damaged ({error}); nnxlaunch cancel {name} --backend local removes it",
        }  # fmt: skip
        metadata = {"name": name, "namespace": self.path.parent.name, "uid": name}
        status = {"restarts": 0, "restartsCountTowardsMax": 0, "terminalState": "Failed", "conditions": [failed]}
        return Snapshot({"kind": "JobSet", "metadata": metadata, "spec": {"replicatedJobs": []}, "status": status}, [], [], [])

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            raise self._not_found() from None

    def _not_found(self) -> NotFound:
        return NotFound(f"no local job {self.path.name!r}", hint="see what there is with: nnxlaunch list --backend local")


def create_folder(path: Path, documents: Mapping[str, Any]) -> None:
    """Make the folder with its first documents, all of it or nothing. Raises FileExistsError when the name is taken."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    draft.mkdir(mode=0o700)
    for name, document in documents.items():
        _replace(draft / name, document)
    (draft / "lock").touch()
    (draft / "pods").mkdir()
    try:
        os.rename(draft, path)  # onto an existing folder that is not empty this fails
    except OSError:
        shutil.rmtree(draft)
        raise FileExistsError(path) from None


def end_pods(pods: Sequence[Manifest]) -> None:
    """SIGKILL for every process that belongs to one of these pods."""
    for pod in pods:
        pid, _, started = str(mapping(pod["metadata"].get("annotations")).get(IDENTITY_ANNOTATION, "")).partition(" ")
        if pid and process_start(int(pid)) == started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(int(pid), signal.SIGKILL)
    uids = [pod["metadata"]["uid"] for pod in pods]
    for pid in descendants(uids):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def process_start(pid: int) -> str:
    """When the process started, in the system's own form; empty when it is gone. With its id this names it for good."""
    if sys.platform == "linux":
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        except OSError:
            return ""
    return subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout.strip()


def _alive(pod: Manifest) -> bool:
    return pod["status"]["phase"] in ("Pending", "Running")


def _locked(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except BlockingIOError:
        return True
    return False


def _replace(path: Path, document: Any) -> None:
    """Write `document` whole; on the disk before its name is, so that a power cut leaves the old one."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    with open(draft, "w") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
