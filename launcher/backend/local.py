"""The backend of this machine: it runs the rendered JobSet itself, as processes under a supervisor of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from launcher.backend.local_jobset import LocalJobSet
from launcher.backend.local_logs import log_lines
from launcher.backend.local_pod import refuse_what_cannot_run_here
from launcher.backend.local_state import LOOK_SECONDS, JobFolder, Snapshot, create_folder, state_root
from launcher.backend.scene import Scene
from launcher.backend.status import (
    RUN_DIRECTORY_ANNOTATION,
    SUBMIT_INTERRUPTED,
    SUBMITTED_BY_ANNOTATION,
    SUPERVISOR_LOST,
    Event,
    JobStatus,
    LogLine,
    Manifest,
    user,
)
from launcher.backend.values import check_namespace, mapping
from launcher.errors import AlreadyExists, NotFound, Unavailable, way_past
from launcher.image import own_revision
from trainer.contract import CONFIG_FILE, IMAGE_REVISION

START_SECONDS: Final = 30.0
PATIENCE_SECONDS: Final = 15.0
"""Beyond the pods' grace, before a supervisor is killed that does not end."""


class LocalBackend:
    def __init__(self, *, namespace: str = "default") -> None:
        check_namespace(namespace)
        self.namespace = namespace
        self._root = state_root() / namespace

    def create(self, manifests: Sequence[Manifest], *, replace: bool = False) -> JobStatus:
        jobset = next(manifest for manifest in manifests if manifest["kind"] == "JobSet")
        name = jobset["metadata"]["name"]
        refuse_what_cannot_run_here(jobset)
        if find_spec("jax") is None:
            raise Unavailable("this Python has the launcher, but not the trainer's libraries", hint="in the clone: ./setup.sh train")
        placed = _placed(manifests, self.namespace)
        control = LocalJobSet(next(manifest for manifest in placed if manifest["kind"] == "JobSet"), lambda: datetime.now(UTC))
        first = Snapshot(control.jobset, [], [], [])
        folder = JobFolder(self._root / name)
        with folder.claimed() as claim:
            if folder.path.exists():
                if replace:
                    _remove(folder)
                elif not folder.begun or folder.expired():  # an interrupted submit is completed by the same one again
                    folder.remove()
            try:
                create_folder(
                    folder.path, {"manifests.json": {"manifests": placed, "directory": os.getcwd()}, "status.json": first.document}
                )
            except FileExistsError:
                raise AlreadyExists(f"a local job {name!r} exists already", hint=way_past(finished=not folder.supervisor_lives)) from None
            self._supervise(folder, claim)
            return self.get(name)

    def get(self, name: str) -> JobStatus:
        return self._status(self._folder(name))

    def scene(self, name: str) -> Scene:
        snapshot = self._snapshot(self._folder(name))
        events = tuple(
            {
                "involvedObject": dict(zip(("kind", "name"), event.about.split("/", 1), strict=True)),
                "type": "Warning" if event.warning else "Normal",
                "reason": event.reason,
                "message": event.message,
                "metadata": {"creationTimestamp": event.at.isoformat() if event.at else None},
            }
            for event in snapshot.events
        )
        return Scene(
            jobset=snapshot.jobset, pods=tuple(snapshot.present), jobs=tuple(snapshot.jobs), events=events,
            read_at=datetime.now(UTC).isoformat(),
        )  # fmt: skip

    def list(self) -> list[JobStatus]:
        found: list[JobStatus] = []
        for path in sorted(self._root.glob("[!.]*")):
            self._forget_expired(path.name)
            with contextlib.suppress(NotFound):
                found.append(self._status(JobFolder(path)))
        return found

    def delete(self, name: str) -> None:
        folder = self._folder(name)
        with folder.claimed():
            _remove(self._folder(name))

    def suspend(self, name: str) -> JobStatus:
        raise self._no_suspension(name)

    def resume(self, name: str) -> JobStatus:
        raise self._no_suspension(name)

    def _no_suspension(self, name: str) -> Unavailable:
        self._folder(name)
        return Unavailable(
            "a job of this machine cannot be suspended and resumed",
            hint=f"nnxlaunch cancel {name} --backend local; the same spec submitted again goes on from its last committed checkpoint",
        )

    def watch(self, name: str, *, timeout_seconds: float | None = None) -> Iterator[JobStatus]:
        folder = self._folder(name)
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        last: JobStatus | None = None
        while True:
            status = self._status(folder)
            if status != last:
                yield status
            last = status
            if status.state.finished or (deadline is not None and time.monotonic() >= deadline):
                return
            time.sleep(LOOK_SECONDS)

    def logs(
        self, name: str, *, follow: bool = False, slice_index: int | None = None, worker: int | None = None,
        since_seconds: float | None = None,
    ) -> Iterator[LogLine]:  # fmt: skip
        if since_seconds is not None:
            raise Unavailable("the logs of a local job have no times", hint="leave --since out")
        folder = self._folder(name)

        def over() -> bool:
            return not folder.busy()

        return log_lines(folder, follow=follow, slice_index=slice_index, worker=worker, over=over)

    def run_directory(self, name: str) -> str:
        return self.get(name).annotations.get(RUN_DIRECTORY_ANNOTATION, "")

    def events(self, name: str) -> Sequence[Event]:
        return self._snapshot(self._folder(name)).events

    def _folder(self, name: str) -> JobFolder:
        folder = JobFolder(self._root / name)
        if "/" in name or name.startswith(".") or not folder.path.is_dir():
            raise NotFound(
                f"no local job {name!r} in namespace {self.namespace!r}", hint="see what there is with: nnxlaunch list --backend local"
            )
        return folder

    def _status(self, folder: JobFolder) -> JobStatus:
        return self._snapshot(folder).status

    def _snapshot(self, folder: JobFolder) -> Snapshot:
        """As the supervisor wrote it; without a supervisor, an unfinished job is lost. Looking ends no process: `delete` does."""
        busy = folder.busy()  # asked first: it may finish between the two
        snapshot = folder.read()
        if busy or snapshot.finished:
            return snapshot
        return _lost(folder, snapshot)

    def _forget_expired(self, name: str) -> None:
        with contextlib.suppress(NotFound, BlockingIOError):
            folder = self._folder(name)
            if folder.expired() and not folder.busy():
                with folder.claimed(wait=False):
                    if folder.expired():
                        folder.remove()

    def _supervise(self, folder: JobFolder, claim: int) -> None:
        """Start a supervisor; it holds the descriptor `claim`, too, until it holds its own lock."""
        ready, its_end = os.pipe()
        try:
            with open(folder.path / "supervisor.log", "ab") as log:
                command = [sys.executable, "-m", "launcher.backend.local_supervisor", str(folder.path), str(its_end), str(claim)]
                environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_import_paths()), IMAGE_REVISION: own_revision()}
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(its_end, claim), env=environment,
                    start_new_session=True, timeout=START_SECONDS, check=False,
                )  # fmt: skip
            os.close(its_end)
            its_end = -1
            if done.returncode or os.read(ready, 1) != b"1":
                words = (folder.path / "supervisor.log").read_text()
                folder.remove()
                raise Unavailable(f"the job's supervisor did not start:\n{words.strip()}")
        finally:
            os.close(ready)
            if its_end >= 0:
                os.close(its_end)


def _lost(folder: JobFolder, snapshot: Snapshot) -> Snapshot:
    """`snapshot` of an unfinished job without a supervisor: failed, its pods gone with it."""
    # The supervisor writes when something happens; what it started ends with it.
    written = [folder.path / "status.json", *folder.pods.glob("*/log")]
    heard = datetime.fromtimestamp(max(path.stat().st_mtime for path in written), UTC)
    reason, words = SUBMIT_INTERRUPTED, "its submit was interrupted before the job started; the same one again completes it"
    if folder.begun:
        reason, log = SUPERVISOR_LOST, folder.path / "supervisor.log"
        said = f"; its words: {log}" if log.exists() and log.stat().st_size else ""
        words = (
            f"its supervisor, process {folder.supervisor_pid}, was killed, or this machine was restarted: "
            f"it or one of its pods wrote last at {heard:%Y-%m-%d %H:%M:%S} UTC{said}"
        )
    failed = {"type": "Failed", "status": "True", "reason": reason, "message": words, "lastTransitionTime": heard.isoformat()}
    snapshot.jobset["status"] |= {"terminalState": "Failed", "conditions": [failed]}
    about = f"jobset/{snapshot.jobset['metadata']['name']}"
    snapshot.events.append(Event(at=heard, warning=True, reason=reason, message=words, about=about))
    for pod in snapshot.pods:
        if pod["status"]["phase"] in ("Pending", "Running"):
            pod["status"] |= {"phase": "Unknown", "conditions": []}
    return snapshot


def _remove(folder: JobFolder) -> None:
    """End the job and take its folder away; the caller holds the name."""
    pods = [job["template"]["spec"]["template"]["spec"] for job in folder.read().jobset["spec"]["replicatedJobs"]]
    grace = max((float(pod.get("terminationGracePeriodSeconds", 30)) for pod in pods), default=30.0)
    folder.stop(grace + PATIENCE_SECONDS)
    folder.remove()


def _placed(manifests: Sequence[Manifest], namespace: str) -> list[Manifest]:
    """The manifests in their namespace; the JobSet with a note of its run directory, so that `status` finds the metrics."""
    directory = ""
    for manifest in manifests:
        if manifest["kind"] == "ConfigMap" and CONFIG_FILE in mapping(manifest.get("data")):
            directory = str(json.loads(manifest["data"][CONFIG_FILE]).get("run_directory", ""))
    placed: list[Manifest] = []
    for manifest in manifests:
        metadata: Manifest = {**manifest["metadata"], "namespace": namespace}
        if manifest["kind"] == "JobSet":
            marks = {**mapping(metadata.get("annotations")), SUBMITTED_BY_ANNOTATION: user()}
            if directory:
                marks[RUN_DIRECTORY_ANNOTATION] = directory if "://" in directory else os.path.abspath(directory)
            metadata["annotations"] = marks
        placed.append({**manifest, "metadata": metadata})
    return placed


def _import_paths() -> list[str]:
    """Where this process found the launcher, for programs that run elsewhere."""
    here = str(Path(__file__).resolve().parents[2])
    return [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
