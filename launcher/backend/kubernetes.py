"""The backend that talks to a cluster: create, read, watch, follow and delete one job and what belongs to it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from launcher.backend.kubernetes_api import CONFIG_MAP, EVENT, JOB, JOBSET, POD, Api, Patience, Resource
from launcher.backend.kubernetes_control import hold, let_go
from launcher.backend.kubernetes_errors import TemporarilyUnavailable
from launcher.backend.kubernetes_login import log_in
from launcher.backend.kubernetes_logs import LOOK_SECONDS, PATIENCE_SECONDS, follow_logs, read_logs, since_time
from launcher.backend.kubernetes_queue import GROUP, queued_status, workload_of
from launcher.backend.kubernetes_scene import SceneReader
from launcher.backend.scene import Scene, event_of, own_events
from launcher.backend.selection import Selection
from launcher.backend.status import (
    JOBSET_NAME_LABEL,
    QUEUE_LABEL,
    Event,
    JobState,
    JobStatus,
    LogLine,
    Manifest,
    job_status,
    replicated_jobs,
)
from launcher.backend.values import items, mapping
from launcher.errors import AlreadyExists, NotFound, Unavailable
from launcher.labels import MANAGED_BY, MANAGED_BY_LABEL, XPK_LABEL
from trainer.contract import CONFIG_FILE

if TYPE_CHECKING:
    from launcher.doctor import Finding
    from launcher.spec import JobSpec

CONFIG_VOLUME: Final = "config"


class KubernetesBackend:
    """Jobs in one namespace of one cluster."""

    def __init__(self, *, context: str | None = None, kubeconfig: str | None = None, namespace: str | None = None) -> None:
        login = log_in(context=context, kubeconfig=kubeconfig)
        self._api = Api(login)
        self.namespace = namespace or login.namespace
        self._scenes = SceneReader(self._api, self.namespace)
        self._kueue: str | None = None  # the version that is served, once it was asked for

    def create(self, manifests: Sequence[Manifest], *, replace: bool = False) -> JobStatus:
        """Create one job from its manifests; the server checks all of them before the first is made.

        What an interrupted submit of the same spec has begun is completed.
        """
        from launcher.backend.kubernetes_submit import Submission

        submission = Submission(self._api, self.namespace, manifests)
        submission.create(remove=self._make_room if replace else None)
        return self.get(submission.name)

    def check(self, manifests: Sequence[Manifest], *, replace: bool = False) -> None:
        """Have the server try all of `create` without doing it. Raises as `create`."""
        from launcher.backend.kubernetes_submit import Submission

        Submission(self._api, self.namespace, manifests).check(replace=replace)

    def get(self, name: str) -> JobStatus:
        return self._status(self._jobset(name))

    def list(self) -> list[JobStatus]:
        jobsets = [jobset for jobset in self._api.list(JOBSET, self.namespace) if _is_a_job(jobset)]
        if not jobsets:
            return []
        pods, jobs = self._children(None)
        workloads = self._workloads(jobsets)
        statuses = [
            queued_status(
                job_status(jobset, _of(jobset["metadata"]["name"], pods), _of(jobset["metadata"]["name"], jobs)),
                workload_of(jobset, workloads),
            )
            for jobset in jobsets
        ]
        return sorted(statuses, key=lambda status: status.name)

    def delete(self, name: str) -> None:
        """Dependents first, so that it returns when the pods have ended, their grace period included."""
        jobset = self._jobset(name)
        uid = jobset["metadata"]["uid"]
        self._api.delete(JOBSET, self.namespace, name, uid=uid)
        patience = Patience(PATIENCE_SECONDS)
        while True:
            try:
                jobset = self._jobset(name)
                if jobset["metadata"]["uid"] != uid:
                    return
                self._api.wait_for_change(JOBSET, jobset, timeout_seconds=LOOK_SECONDS)
                patience.good()
            except NotFound:
                return
            except TemporarilyUnavailable as error:
                time.sleep(patience.pause(error))

    def suspend(self, name: str) -> JobStatus:
        hold(self._api, self._jobset(name))
        for status in self.watch(name):
            if status.state in (JobState.SUSPENDED, JobState.QUEUED) and not any(p.phase in ("Pending", "Running") for p in status.pods):
                return status
        return self.get(name)

    def resume(self, name: str) -> JobStatus:
        let_go(self._api, self._jobset(name))
        return self.get(name)

    def watch(self, name: str, *, timeout_seconds: float | None = None) -> Iterator[JobStatus]:
        """The JobSet is watched; its pods are looked at when it changes, and every few seconds for why they wait."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        patience = Patience(PATIENCE_SECONDS)
        last: JobStatus | None = None
        while True:
            left = LOOK_SECONDS if deadline is None else deadline - time.monotonic()
            try:
                jobset = self._jobset(name)
                status = self._status(jobset)
                patience.good()
                if status != last:
                    yield status
                last = status
                if status.state.finished or left <= 0:
                    return
                self._api.wait_for_change(JOBSET, jobset, timeout_seconds=min(LOOK_SECONDS, left))
            except TemporarilyUnavailable as error:
                if last is None or left <= 0:
                    raise
                time.sleep(patience.pause(error))

    def logs(
        self, name: str, *, follow: bool = False, slice_index: int | None = None, worker: int | None = None,
        since_seconds: float | None = None,
    ) -> Iterator[LogLine]:  # fmt: skip
        self._jobset(name)
        since = None if since_seconds is None else since_time(self._api.now(), since_seconds)
        selection = Selection(slice_index=slice_index, worker=worker, since=since)
        return (follow_logs if follow else read_logs)(self._api, self.namespace, name, selection)

    def run_directory(self, name: str) -> str:
        pods = [part["template"]["spec"]["template"]["spec"] for part in replicated_jobs(self._jobset(name))]
        for mount in (mount for pod in pods for mount in items(pod.get("volumes"))):
            config = mapping(mount.get("configMap")).get("name")
            if mount["name"] == CONFIG_VOLUME and config:
                document = mapping(self._api.get(CONFIG_MAP, self.namespace, config).get("data")).get(CONFIG_FILE, "{}")
                return str(json.loads(document).get("run_directory", ""))
        return ""

    def events(self, name: str) -> Sequence[Event]:
        return [event_of(raw) for raw in own_events(self._jobset(name), self._api.list(EVENT, self.namespace))]

    def examine(self, spec: JobSpec | None) -> Iterator[Finding]:
        """What stands between this namespace and a job; creates nothing."""
        from launcher.backend.kubernetes_doctor import Doctor

        return Doctor(self._api, self.namespace, spec).examine()

    def scene(self, name: str) -> Scene:
        return self._scenes.read(self._jobset(name))

    def _make_room(self, name: str) -> None:
        if not _is_a_job(self._jobset(name)):
            raise AlreadyExists(
                f"JobSet {name!r} in namespace {self.namespace!r} is of another tool, which --replace leaves alone",
                hint=f"choose another name, or remove it with: nnxlaunch delete {name} -n {self.namespace}",
            )
        self.delete(name)

    def _jobset(self, name: str) -> Manifest:
        try:
            return self._api.get(JOBSET, self.namespace, name)
        except NotFound:
            where = f"namespace {self.namespace!r} of {self._api.where}"
            raise NotFound(f"no job {name!r} in {where}", hint=f"see what there is with: nnxlaunch list -n {self.namespace}") from None

    def _status(self, jobset: Manifest) -> JobStatus:
        pods, jobs = self._children(jobset["metadata"]["name"])
        return queued_status(job_status(jobset, pods, jobs), workload_of(jobset, self._workloads([jobset])))

    def _children(self, name: str | None) -> tuple[list[Manifest], list[Manifest]]:
        """Pods and Jobs of the job, or of all jobs."""
        labels = JOBSET_NAME_LABEL if name is None else f"{JOBSET_NAME_LABEL}={name}"
        return self._api.list_whole(POD, self.namespace, labels=labels), self._api.list_whole(JOB, self.namespace, labels=labels)

    def _workloads(self, jobsets: Sequence[Manifest]) -> list[Manifest]:
        """Kueue's view, where a job waits for it and this user may read it; nothing depends on having it."""
        if not any(jobset["spec"].get("suspend") and QUEUE_LABEL in mapping(jobset["metadata"].get("labels")) for jobset in jobsets):
            return []
        self._kueue = self._kueue or self._api.served_version(GROUP)
        try:
            return self._api.list_whole(Resource(self._kueue, "Workload", "workloads"), self.namespace) if self._kueue else []
        except (NotFound, Unavailable):
            return []


def _is_a_job(jobset: Manifest) -> bool:
    """This launcher's, or one that XPK has made."""
    labels = mapping(jobset["metadata"].get("labels"))
    return labels.get(MANAGED_BY_LABEL) == MANAGED_BY or XPK_LABEL in labels


def _of(name: str, children: Sequence[Manifest]) -> list[Manifest]:
    return [child for child in children if child["metadata"]["labels"][JOBSET_NAME_LABEL] == name]
