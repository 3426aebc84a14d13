"""One look at a job: the API objects that say how it is doing, as plain values.

A backend reads a scene; `launcher.observe` says what it means. Nothing here talks to anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from functools import cached_property
from typing import Any, Final, cast

from launcher.backend.kubernetes_queue import queued_status, workload_of
from launcher.backend.status import QUEUE_LABEL, Event, JobState, JobStatus, Manifest, job_status, replicated_jobs, timestamp
from launcher.backend.values import mapping

USUAL_EVENTS: Final = ("Scheduled", "Pulled", "Created", "Started", "SuccessfulCreate")
"""Events of every pod that does well; a scene leaves them out, because a large job has thousands."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What was read; an empty or missing part was not needed, is not there (`absent`) or may not be read (`unreadable`)."""

    jobset: Manifest
    read_at: str  # RFC 3339
    pods: tuple[Manifest, ...] = ()
    jobs: tuple[Manifest, ...] = ()
    rivals: tuple[Manifest, ...] = ()  # parts of other JobSets of the namespace with pods, where pods of this one find no place
    events: tuple[Manifest, ...] = ()  # of this job, oldest first
    workloads: tuple[Manifest, ...] = ()  # Kueue's, of the namespace or, where that is allowed, of the cluster
    local_queue: Manifest | None = None
    cluster_queue: Manifest | None = None
    pending: tuple[Manifest, ...] = ()  # Kueue's order of what waits in the cluster queue
    nodes: tuple[Manifest, ...] = ()
    log: tuple[str, ...] = ()  # the end of process 0's log, each line with its time
    absent: tuple[str, ...] = ()  # `kind/name` of what was looked for
    unreadable: tuple[str, ...] = ()  # plural kinds that this user may not read

    @cached_property
    def status(self) -> JobStatus:
        return queued_status(job_status(self.jobset, self.pods, self.jobs), self.workload)

    @property
    def name(self) -> str:
        return self.jobset["metadata"]["name"]

    @property
    def namespace(self) -> str:
        return self.jobset["metadata"].get("namespace", "default")

    @property
    def queue(self) -> str:
        """Name of the local queue; empty for a job that is in none."""
        return mapping(self.jobset["metadata"].get("labels")).get(QUEUE_LABEL, "")

    @property
    def workload(self) -> Manifest | None:
        return workload_of(self.jobset, self.workloads)

    @property
    def now(self) -> datetime:
        return datetime.fromisoformat(self.read_at)

    def is_absent(self, kind: str, name: str) -> bool:
        return f"{kind}/{name}" in self.absent

    def said(self, *, about: str = "", reason: str = "") -> list[Event]:
        """Events about a kind of object (`pod`) or one object (`pod/NAME`), newest first."""
        found = [event_of(raw) for raw in reversed(self.events) if not reason or raw.get("reason") == reason]
        return [event for event in found if not about or event.about == about or event.about.partition("/")[0] == about]

    def as_data(self) -> dict[str, Any]:
        """As JSON can keep it."""
        return {key: value for key, value in asdict(self).items() if value not in (None, (), [])}


def scene_from_data(data: dict[str, Any]) -> Scene:
    """The scene that `as_data` gave."""
    known = {field.name for field in fields(Scene)}
    parts: dict[str, Any] = {
        key: tuple(cast("list[Any]", value)) if isinstance(value, list) else value for key, value in data.items() if key in known
    }
    return Scene(**parts)


def is_queued(jobset: Manifest) -> bool:
    """Whether the job is suspended by its queue, and not finished."""
    return job_status(jobset, []).state is JobState.QUEUED


def event_of(raw: Manifest) -> Event:
    about = raw["involvedObject"]
    return Event(
        at=event_time(raw),
        warning=raw.get("type") == "Warning",
        reason=raw.get("reason", ""),
        message=(raw.get("message") or "").strip(),
        about=f"{about['kind'].lower()}/{about['name']}",
    )


def event_time(raw: Manifest) -> datetime | None:
    """When it was seen last."""
    series = mapping(raw.get("series")).get("lastObservedTime")
    return timestamp(series or raw.get("lastTimestamp") or raw.get("eventTime") or raw["metadata"].get("creationTimestamp"))


def own_events(jobset: Manifest, events: Iterable[Manifest]) -> tuple[Manifest, ...]:
    """Those about the job, its Jobs, pods and Workload, of any attempt, oldest first.

    Pods and Jobs of earlier attempts are gone, so they are known by name; an earlier job of the same name by its time.
    """
    metadata = jobset["metadata"]
    name, uid, created = re.escape(metadata["name"]), metadata["uid"], timestamp(metadata.get("creationTimestamp"))
    parts = "|".join(re.escape(part["name"]) for part in replicated_jobs(jobset))
    own = {
        "JobSet": re.compile(name),
        "Job": re.compile(rf"{name}-({parts})-\d+"),
        "Pod": re.compile(rf"{name}-({parts})-\d+-\d+(-[a-z0-9]{{5}})?"),
        "Workload": re.compile(rf"jobset-{name}-[0-9a-f]{{5}}"),
    }
    found: list[tuple[str, Manifest]] = []
    for raw in events:
        about, at = raw["involvedObject"], event_time(raw)
        pattern = own.get(about.get("kind", ""))
        if not pattern or not pattern.fullmatch(about.get("name", "")) or (at and created and at < created):
            continue
        if about["kind"] == "JobSet" and about.get("uid") not in (None, "", uid):
            continue
        found.append((at.isoformat() if at else "", raw))
    return tuple(raw for _, raw in sorted(found, key=lambda pair: pair[0]))
