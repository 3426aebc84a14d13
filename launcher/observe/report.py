"""Everything `status` shows, as values: a pure function of a scene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from launcher.backend.scene import Scene, event_of
from launcher.backend.status import RUN_DIRECTORY_ANNOTATION, Event, JobStatus, as_data
from launcher.backend.values import items, mapping
from launcher.observe.cause import Cause
from launcher.observe.history import restarts
from launcher.observe.progress import Progress
from launcher.observe.quantity import quantity
from launcher.observe.remarks import Remark, progress_of, remarks
from launcher.observe.why import why
from launcher.observe.why_queue import cluster_of, position


@dataclass(frozen=True, kw_only=True)
class Quota:
    resource: str
    asked: str  # by the job
    used: str  # in its cluster queue, by all
    limit: str


@dataclass(frozen=True, kw_only=True)
class Queue:
    name: str
    cluster_queue: str
    position: int | None  # from 1
    waiting: int
    quota: tuple[Quota, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    status: JobStatus
    cause: Cause
    remarks: tuple[Remark, ...]
    progress: Progress | None
    queue: Queue | None
    last_restart: str  # what ended the attempt before this one
    directory: str  # of the run, where this machine knows it
    events: tuple[Event, ...]  # oldest first
    now: datetime

    @property
    def slices_ready(self) -> int:
        return sum(part.ready == part.hosts for part in self.status.slices)

    def as_data(self) -> dict[str, Any]:
        """For scripts. The job's status at the top level, times in RFC 3339."""
        progress, queue = self.progress, self.queue
        return {
            **as_data(self.status),
            "slices_ready": self.slices_ready,
            "hosts_ready": self.status.ready,
            "cause": {"code": self.cause.code, "sentence": self.cause.sentence, "evidence": list(self.cause.evidence)},
            "next": self.cause.fix,
            "remarks": [asdict(remark) for remark in self.remarks],
            "last_restart": self.last_restart,
            "progress": progress and {
                "done": progress.done, "total": progress.total, "loss": progress.loss, "step_seconds": progress.step_seconds,
                "at": _text(progress.at), "checkpoint": progress.checkpoint, "checkpoint_at": _text(progress.checkpoint_at),
                "save_seconds": progress.save_seconds,
            },
            "queue": queue and {
                "name": queue.name, "cluster_queue": queue.cluster_queue, "position": queue.position, "waiting": queue.waiting,
                "quota": [{"resource": q.resource, "asked": q.asked, "used": q.used, "limit": q.limit} for q in queue.quota],
            },
            "events": [as_data(event) for event in self.events],
        }  # fmt: skip


def report(scene: Scene) -> Report:
    directory = scene.status.annotations.get(RUN_DIRECTORY_ANNOTATION, "")
    history, progress = restarts(scene), progress_of(scene)
    return Report(
        status=scene.status,
        cause=why(scene),
        remarks=tuple(remarks(scene, progress)),
        progress=progress,
        queue=_queue(scene),
        last_restart=history[0].sentence if history else "",
        directory=directory,
        events=tuple(map(event_of, scene.events)),
        now=scene.now,
    )


def _queue(scene: Scene) -> Queue | None:
    if not scene.queue:
        return None
    place = position(scene)
    return Queue(
        name=scene.queue,
        cluster_queue=cluster_of(scene),
        position=None if place is None else place + 1,
        waiting=len(scene.pending),
        quota=tuple(_quota(scene)),
    )


def _quota(scene: Scene) -> Sequence[Quota]:
    """Of each resource the job asks for and its cluster queue counts; empty where the queue was not read."""
    if not scene.cluster_queue or not scene.workload:
        return []
    asked: dict[str, list[str]] = {}
    for part in items(mapping(scene.workload.get("status")).get("resourceRequests")):
        for resource, amount in mapping(part.get("resources")).items():
            asked.setdefault(resource, []).append(str(amount))
    limits = _sums(scene.cluster_queue["spec"].get("resourceGroups"), "nominalQuota", nested=True)
    used = _sums(mapping(scene.cluster_queue.get("status")).get("flavorsReservation"), "total", nested=False)
    return [
        Quota(resource=resource, asked=" + ".join(amounts), used=_said(used.get(resource, [])), limit=_said(limits[resource]))
        for resource, amounts in sorted(asked.items())
        if resource in limits
    ]


def _sums(groups: Any, key: str, *, nested: bool) -> dict[str, list[str]]:
    flavors = [flavor for group in items(groups) for flavor in items(group.get("flavors"))] if nested else items(groups)
    found: dict[str, list[str]] = {}
    for flavor in flavors:
        for resource in items(flavor.get("resources")):
            found.setdefault(str(resource["name"]), []).append(str(resource.get(key, "0")))
    return found


def _said(amounts: Sequence[str]) -> str:
    """One amount as it was written; several as their sum."""
    if len(amounts) == 1:
        return amounts[0]
    return f"{sum(map(quantity, amounts)):g}"


def _text(at: datetime | None) -> str | None:
    return at.isoformat(timespec="seconds") if at else None
