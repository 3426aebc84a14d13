"""One dominant cause for the state a job is in: a pure function of a scene."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.backend.scene import Scene
from launcher.backend.status import JobState
from launcher.backend.values import items, mapping
from launcher.observe.cause import Cause, condition_line, pods_of
from launcher.observe.why_end import failed, last_restart, leaving, looping, restarted
from launcher.observe.why_place import lost_nodes, no_place
from launcher.observe.why_queue import queue_causes
from launcher.observe.why_refused import refusals, waits_for_leader
from launcher.observe.why_start import not_started

NOTHING = "nothing to do"


def why(scene: Scene) -> Cause:
    """The cause that must go first: with it gone, the next one shows."""
    return next(causes(scene))


def causes(scene: Scene) -> Iterator[Cause]:
    """At least one; the dominant one first."""
    match scene.status.state:
        case JobState.COMPLETED:
            yield Cause(code="completed", sentence=f"the job is done: {scene.status.message}{last_restart(scene)}", fix=NOTHING,
                        evidence=_conditions(scene, "Completed"))  # fmt: skip
        case JobState.FAILED:
            yield failed(scene)
        case JobState.QUEUED:
            yield from queue_causes(scene)
        case JobState.SUSPENDED:
            yield Cause(
                code="suspended",
                sentence="the job is suspended by hand: its spec says `suspend: true`, and it is in no queue that would start it",
                fix=f"nnxlaunch resume {scene.name}",
                evidence=_conditions(scene, "Suspended"),
            )
        case JobState.CANCELLING:
            yield from leaving(scene)
            yield Cause(code="leaving", sentence="the job is being removed; its pods are gone", fix="wait a moment")
        case JobState.PENDING | JobState.RESTARTING | JobState.RUNNING:
            yield from _active(scene)


def _active(scene: Scene) -> Iterator[Cause]:
    yield from lost_nodes(scene)
    yield from no_place(scene)
    yield from not_started(scene)
    yield from refusals(scene)
    yield from looping(scene)
    yield from leaving(scene)
    if not scene.status.hosts:
        yield Cause(
            code="no-jobs",
            sentence=scene.status.message,
            fix=f"whoever made it gives it `replicatedJobs`: kubectl describe jobset {scene.name} -n {scene.namespace}",
            evidence=(f"jobset/{scene.name}: spec.replicatedJobs is empty",),
        )
    elif scene.status.state is not JobState.RUNNING:
        yield from restarted(scene)
        yield from waits_for_leader(scene)
        yield Cause(
            code="starting",
            sentence=f"the pods are on their way: {scene.status.message}",
            fix="wait a moment and look again; large images take minutes on a new node",
            evidence=tuple(f"pod/{p.status.name}: {p.status.phase}, {p.status.message}" for p in pods_of(scene) if not p.status.ready)[:4],
        )
    else:
        yield Cause(
            code="running",
            sentence=f"nothing is wrong: {scene.status.message}{last_restart(scene)}",
            fix=f"{NOTHING}; follow it with: nnxlaunch logs {scene.name} -f",
            evidence=tuple(f"pod/{pod.status.name}: {pod.status.phase} on {pod.status.node}" for pod in pods_of(scene))[:2],
        )


def _conditions(scene: Scene, kind: str) -> tuple[str, ...]:
    conditions = mapping(scene.jobset.get("status")).get("conditions")
    return tuple(condition_line(f"jobset/{scene.name}", c) for c in items(conditions) if c["type"] == kind)
