"""A job's status as plain values, computed from API objects (JobSet, Jobs, Pods) as any backend returns them.

Everything here is a pure function of dicts in the API's own shape, so recorded objects test it and the local
backend, which writes such objects itself, needs no second reading of them.
"""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, cast

from launcher.backend.values import items, mapping
from launcher.labels import DEFAULT_CONTAINER_ANNOTATION
from trainer.contract import CONTAINER_NAME, HINT, MEANING

Manifest = dict[str, Any]
"""A Kubernetes object as a dict."""

_HINT: Final = re.compile(rf"\n *{HINT}")

FOLLOWERS_EXIT_CODES: Final = (75, 76, 143)
"""Of hosts that were asked to leave or have lost a peer: seldom the cause."""

JOBSET_NAME_LABEL: Final = "jobset.sigs.k8s.io/jobset-name"
REPLICATED_JOB_LABEL: Final = "jobset.sigs.k8s.io/replicatedjob-name"
JOB_INDEX_LABEL: Final = "jobset.sigs.k8s.io/job-index"
GLOBAL_INDEX_LABEL: Final = "jobset.sigs.k8s.io/job-global-index"
"""Over all replicated jobs of the JobSet; another tool's may have several, and each begins its job-index at 0."""
RESTART_ATTEMPT_LABEL: Final = "jobset.sigs.k8s.io/restart-attempt"
COMPLETION_INDEX_LABEL: Final = "batch.kubernetes.io/job-completion-index"
QUEUE_LABEL: Final = "kueue.x-k8s.io/queue-name"
RUN_DIRECTORY_ANNOTATION: Final = "nnxlaunch/run-directory"
SUBMITTED_BY_ANNOTATION: Final = "nnxlaunch/submitted-by"

SUPERVISOR_LOST: Final = "SupervisorLost"
SUBMIT_INTERRUPTED: Final = "SubmitInterrupted"
"""Reasons for the end of a local job that a cluster does not know."""


class JobState(StrEnum):
    QUEUED = "queued"  # suspended until its queue admits it
    SUSPENDED = "suspended"
    PENDING = "pending"  # not every pod runs yet
    RUNNING = "running"
    RESTARTING = "restarting"  # pods of an older attempt are still leaving, or the new ones still coming
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"

    @property
    def finished(self) -> bool:
        return self in (JobState.COMPLETED, JobState.FAILED)


@dataclass(frozen=True, kw_only=True)
class PodStatus:
    name: str
    slice_index: int
    worker: int
    attempt: int
    phase: str  # Pending, Running, Succeeded, Failed, Unknown
    ready: bool
    leaving: bool  # being deleted
    node: str | None
    exit_code: int | None
    message: str  # why it waits or how it ended, in the cluster's or the trainer's words
    started_at: datetime | None
    finished_at: datetime | None
    container: str = CONTAINER_NAME  # whose state and log are meant

    @property
    def words(self) -> str:
        """The message without the trainer's hint."""
        return _HINT.split(self.message)[0]

    @property
    def hint(self) -> str:
        """What the trainer says is to be done; empty where it says nothing."""
        return "".join(_HINT.split(self.message)[1:])


@dataclass(frozen=True, kw_only=True)
class SliceStatus:
    slice_index: int
    hosts: int
    ready: int
    succeeded: int
    failed: int


@dataclass(frozen=True, kw_only=True)
class Condition:
    type: str
    status: bool
    reason: str
    message: str
    changed_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    name: str
    namespace: str
    state: JobState
    reason: str  # one CamelCase word of the server's, or empty
    message: str  # one sentence for a person: what it waits for, or the cause of its end
    attempt: int  # 0 before the first restart
    restarts_used: int  # restarts that count towards restarts_max
    restarts_free: int
    restarts_max: int
    created_at: datetime | None
    finished_at: datetime | None
    slices: tuple[SliceStatus, ...]
    pods: tuple[PodStatus, ...]
    conditions: tuple[Condition, ...]
    labels: Mapping[str, str]
    annotations: Mapping[str, str]

    @property
    def hosts(self) -> int:
        return sum(part.hosts for part in self.slices)

    @property
    def ready(self) -> int:
        return sum(part.ready for part in self.slices)


@dataclass(frozen=True, kw_only=True)
class LogLine:
    slice_index: int
    worker: int
    attempt: int
    text: str  # without its line end

    @property
    def prefix(self) -> str:
        return f"[s{self.slice_index}/w{self.worker} a{self.attempt}]"


@dataclass(frozen=True, kw_only=True)
class Event:
    at: datetime | None
    warning: bool
    reason: str
    message: str
    about: str  # kind/name of the object it is about


def job_status(jobset: Manifest, pods: Iterable[Manifest], jobs: Iterable[Manifest] = ()) -> JobStatus:
    """The status of `jobset` (with its `status`), its pods of any attempt, and its Jobs where the backend has them."""
    metadata, spec, status = jobset["metadata"], jobset["spec"], jobset.get("status", {})
    pod_states = tuple(sorted((pod_status(pod) for pod in pods), key=lambda pod: (pod.slice_index, pod.worker, pod.attempt)))
    conditions = tuple(_condition(raw) for raw in status.get("conditions", []))
    attempt = int(status.get("restarts", 0))
    used = int(status.get("restartsCountTowardsMax", 0))
    state, reason, message = _state(jobset, conditions, pod_states, tuple(jobs), attempt)
    slices = tuple(_slices(jobset, pod_states, attempt))
    return JobStatus(
        name=metadata["name"],
        namespace=metadata.get("namespace", "default"),
        state=state,
        reason=reason,
        message=message,
        attempt=attempt,
        restarts_used=used,
        restarts_free=attempt - used,
        restarts_max=int(spec.get("failurePolicy", {}).get("maxRestarts", 0)),
        created_at=timestamp(metadata.get("creationTimestamp")),
        finished_at=next((c.changed_at for c in conditions if c.status and c.type in ("Completed", "Failed")), None),
        slices=slices,
        pods=pod_states,
        conditions=conditions,
        labels=dict(metadata.get("labels") or {}),
        annotations=dict(metadata.get("annotations") or {}),
    )


def pod_status(pod: Manifest) -> PodStatus:
    metadata, status = pod["metadata"], pod.get("status", {})
    labels = metadata.get("labels", {})
    name = main_container(pod)
    container = next((c for c in items(status.get("containerStatuses")) if c.get("name") == name), mapping(None))
    state = mapping(container.get("state"))
    ended, waiting, running = mapping(state.get("terminated")), mapping(state.get("waiting")), mapping(state.get("running"))
    message = ended.get("message") or waiting.get("message") or waiting.get("reason") or status.get("message") or ended.get("reason") or ""
    unscheduled = next((c for c in items(status.get("conditions")) if c["type"] == "PodScheduled" and c["status"] == "False"), None)
    if not message and unscheduled:
        message = unscheduled.get("message", "")
    return PodStatus(
        name=metadata["name"],
        slice_index=int(labels.get(GLOBAL_INDEX_LABEL) or labels.get(JOB_INDEX_LABEL, 0)),
        worker=int(labels.get(COMPLETION_INDEX_LABEL, 0)),
        attempt=int(labels.get(RESTART_ATTEMPT_LABEL, 0)),
        phase=status.get("phase", "Pending"),
        ready=any(c["type"] == "Ready" and c["status"] == "True" for c in items(status.get("conditions"))),
        leaving="deletionTimestamp" in metadata,
        node=mapping(pod.get("spec")).get("nodeName"),
        exit_code=ended.get("exitCode"),
        message=message.strip(),
        started_at=timestamp(running.get("startedAt") or ended.get("startedAt")),
        finished_at=timestamp(ended.get("finishedAt")),
        container=name,
    )


def replicated_jobs(jobset: Manifest) -> list[Manifest]:
    """Of another tool's JobSet perhaps none: the server takes a spec without them."""
    return items(jobset["spec"].get("replicatedJobs"))


def main_container(pod: Manifest) -> str:
    """The trainer's; of a pod that another tool has made, the one that it calls the default, else its first."""
    names = [str(container.get("name")) for container in items(mapping(pod.get("spec")).get("containers"))]
    default = mapping(pod["metadata"].get("annotations")).get(DEFAULT_CONTAINER_ANNOTATION)
    return next((name for name in (CONTAINER_NAME, default, *names) if name in names), CONTAINER_NAME)


def as_data(value: JobStatus | Event) -> dict[str, Any]:
    """The value as plain data for JSON or YAML; times in RFC 3339."""
    return {key: _plain(item) for key, item in asdict(value).items()}


def _plain(value: Any) -> Any:
    match value:
        case datetime():
            return value.isoformat(timespec="seconds")
        case dict():
            return {str(key): _plain(item) for key, item in cast("dict[Any, Any]", value).items()}
        case list() | tuple():
            return [_plain(item) for item in cast("Sequence[Any]", value)]
        case StrEnum():
            return value.value
        case _:
            return value


def explain_exit(code: int) -> str:
    """`64 (the config, ... cannot be used)`; signal numbers are named where the contract names them."""
    return f"{code} ({MEANING[code]})" if code in MEANING else str(code)


def user() -> str:
    """Who submits from here: the user name of this machine; empty where it has none, as in a container with a bare number."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return ""


def timestamp(text: Any) -> datetime | None:
    """An RFC 3339 time, or a datetime as the official client gives it, as a datetime with its zone."""
    if text is None or isinstance(text, datetime):
        return text
    return datetime.fromisoformat(str(text))


_EXIT = re.compile(r"Container (?P<container>\S+) for pod (?P<pod>\S+) failed with exit code (?P<code>\d+)")


def failure_cause(pods: Sequence[PodStatus], jobs: Iterable[Manifest]) -> str:
    """What ended the last attempt, from the Job that failed first and the words its pod left; empty when unknown."""
    failed = sorted(
        (
            (str(condition.get("lastTransitionTime") or ""), str(condition.get("message", "")))
            for job in jobs
            for condition in items(mapping(job.get("status")).get("conditions"))
            if condition["type"] in ("Failed", "FailureTarget") and condition["status"] == "True"
        ),
    )
    by_name = {pod.name: pod for pod in pods}
    for _, message in failed:
        if match := _EXIT.search(message):
            pod = by_name.get(match["pod"].rpartition("/")[2])
            return _pod_cause(pod) if pod else f"pod {match['pod']} exited with {explain_exit(int(match['code']))}"
    first = first_to_end(pods)
    return _pod_cause(first) if first else (failed[0][1] if failed else "")


def first_to_end(pods: Iterable[PodStatus]) -> PodStatus | None:
    """Of those that ended badly; of several in one second, which is all the times tell, one that did not end because of another."""
    return min(
        (pod for pod in pods if pod.exit_code), key=lambda pod: (str(pod.finished_at), pod.exit_code in FOLLOWERS_EXIT_CODES), default=None
    )


def _pod_cause(pod: PodStatus) -> str:
    where = f"slice {pod.slice_index}, worker {pod.worker}"
    if pod.exit_code is None:
        return f"{where}: {pod.message or pod.phase}"
    words = f": {pod.words}" if pod.words and pod.words != "Error" else ""
    return f"{where} exited with {explain_exit(pod.exit_code)}{words}"


def _condition(raw: Manifest) -> Condition:
    return Condition(
        type=raw["type"],
        status=raw["status"] == "True",
        reason=raw.get("reason", ""),
        message=raw.get("message", ""),
        changed_at=timestamp(raw.get("lastTransitionTime")),
    )


def _state(
    jobset: Manifest, conditions: Sequence[Condition], pods: Sequence[PodStatus], jobs: Sequence[Manifest], attempt: int
) -> tuple[JobState, str, str]:
    """State by priority, not by the newest condition: several conditions often share one second."""
    status, metadata, spec = jobset.get("status", {}), jobset["metadata"], jobset["spec"]
    true = {condition.type: condition for condition in conditions if condition.status}
    if "Completed" in true or status.get("terminalState") == "Completed":
        return JobState.COMPLETED, _reason(true, "Completed"), "all slices finished"
    present = [pod for pod in pods if pod.attempt == attempt]
    if "Failed" in true or status.get("terminalState") == "Failed":
        words = true["Failed"].message if "Failed" in true else ""
        cause = failure_cause(present or pods, jobs)
        return JobState.FAILED, _reason(true, "Failed"), "; ".join(part for part in (cause, words) if part)
    if metadata.get("deletionTimestamp"):
        return JobState.CANCELLING, "", _waiting_for(pods)
    if spec.get("suspend"):
        queue = mapping(metadata.get("labels")).get(QUEUE_LABEL)
        if queue:
            return JobState.QUEUED, _reason(true, "Suspended"), f"waiting in queue {queue}"
        return JobState.SUSPENDED, _reason(true, "Suspended"), "suspended"
    if any(pod.leaving or pod.attempt < attempt for pod in pods):
        return JobState.RESTARTING, "", _waiting_for([pod for pod in pods if pod.leaving or pod.attempt < attempt])
    want = sum(_hosts(job) * int(job.get("replicas", 1)) for job in replicated_jobs(jobset))
    if not want:
        return JobState.PENDING, "", "the JobSet has no jobs, so nothing runs"
    alive = sum(pod.phase in ("Running", "Succeeded") for pod in present)
    if alive < want:
        blocked = next((pod for pod in present if pod.phase == "Pending" and pod.message), None)
        why = f"; {blocked.name}: {blocked.message}" if blocked else ""
        return (JobState.RESTARTING if attempt else JobState.PENDING), "", f"{alive} of {want} pods run{why}"
    ready = sum(pod.ready for pod in present)
    return JobState.RUNNING, "", f"{ready} of {want} pods ready"


def _reason(conditions: Mapping[str, Condition], kind: str) -> str:
    return conditions[kind].reason if kind in conditions else ""


def _waiting_for(pods: Sequence[PodStatus]) -> str:
    return f"waiting for {len(pods)} pods to leave" if pods else ""


def _hosts(replicated_job: Manifest) -> int:
    spec = replicated_job["template"]["spec"]
    return int(spec.get("completions") or spec.get("parallelism") or 1)


def _slices(jobset: Manifest, pods: Sequence[PodStatus], attempt: int) -> Iterable[SliceStatus]:
    present = [pod for pod in pods if pod.attempt == attempt]
    jobs = [job for job in replicated_jobs(jobset) for _ in range(int(job.get("replicas", 1)))]
    for index, job in enumerate(jobs):
        mine = [pod for pod in present if pod.slice_index == index]
        yield SliceStatus(
            slice_index=index,
            hosts=_hosts(job),
            ready=sum(pod.ready for pod in mine),
            succeeded=sum(pod.phase == "Succeeded" for pod in mine),
            failed=len({pod.worker for pod in mine if pod.phase == "Failed"} - {pod.worker for pod in mine if pod.phase != "Failed"}),
        )
