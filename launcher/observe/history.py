"""What ended each attempt of a job, from the events that outlive its pods."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from launcher.backend.scene import Scene
from launcher.backend.status import Event, explain_exit
from launcher.observe.cause import one_line

_EXITED: Final = re.compile(r"Container \S+ for pod \S+/(?P<pod>\S+) failed with exit code (?P<code>\d+)")
_DISRUPTED: Final = re.compile(r"Pod \S+/(?P<pod>\S+) has condition DisruptionTarget")
_FIRST: Final = re.compile(r"first failed job: (?P<job>[^)\s]+)")
_PLACE: Final = re.compile(r"-(?P<slice>\d+)-(?P<worker>\d+)-[a-z0-9]{5}$")
_RESTARTS: Final = re.compile(r"applying (?P<action>RestartJobSet\w*) failure policy action")
KILLERS: Final = ("Evicted", "Preempted", "TaintManagerEviction", "OOMKilling", "NodeNotReady", "NodeControllerEviction")
"""Reasons of events about a pod that say who ended it."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How an attempt ended."""

    at: datetime | None
    free: bool  # restarted without using the budget
    exit_code: int | None  # of the container that decided; None where a disruption decided, or it is not known
    sentence: str  # who ended and how
    evidence: tuple[Event, ...]

    @property
    def evicted(self) -> Event | None:
        """The event that names who took the pod away."""
        return next((event for event in self.evidence if event.reason in KILLERS), None)


def restarts(scene: Scene) -> list[Ended]:
    """Those the cluster still has events of (an hour, by default), the newest first."""
    failures = scene.said(about="job", reason="PodFailurePolicy")
    found: list[Ended] = []
    for event in scene.said(about=f"jobset/{scene.name}"):
        action = _RESTARTS.search(event.message)
        if action is None or not event.reason.endswith("FailurePolicyAction"):
            continue  # each restart has a second event, named after the rule
        first = _FIRST.search(event.message)
        job = f"job/{first['job']}" if first else ""
        cause = next((f for f in failures if f.about == job and f.at and event.at and f.at <= event.at), None)
        found.append(_ended(scene, event, cause, free="IgnoreMaxRestarts" in action["action"]))
    return found


def _ended(scene: Scene, event: Event, cause: Event | None, *, free: bool) -> Ended:
    words = cause.message if cause else ""
    exited, disrupted = _EXITED.search(words), _DISRUPTED.search(words)
    found = exited or disrupted
    if cause is None or found is None:
        return Ended(at=event.at, free=free, exit_code=None, sentence=one_line(words or event.message), evidence=(event,))
    killers = [said for said in scene.said(about=f"pod/{found['pod']}") if said.reason in KILLERS]
    code = int(exited["code"]) if exited else None
    who = where(found["pod"])
    if killers:
        sentence = f"{who} was {killers[0].reason.lower()}: {one_line(killers[0].message)}"
    elif code is not None:
        sentence = f"{who} exited with {explain_exit(code)}"
    else:
        sentence = f"{who} was taken away (drain, eviction, preemption or a deleted node)"
    return Ended(at=event.at, free=free, exit_code=code, sentence=sentence, evidence=(*killers, cause, event))


def where(pod: str) -> str:
    """`slice 0, worker 1` of a pod's name."""
    found = _PLACE.search(pod)
    return f"slice {found['slice']}, worker {found['worker']}" if found else f"pod {pod}"
