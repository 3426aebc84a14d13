"""What ended each attempt of a job, from the events that outlive its pods."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from itertools import zip_longest
from typing import Final

from launcher.backend.scene import Scene
from launcher.backend.status import Event, explain_exit, first_to_end
from launcher.observe.cause import one_line
from trainer.contract import ATTEMPT_ENDED

_EXITED: Final = re.compile(r"Container \S+ for pod \S+/(?P<pod>\S+) failed with exit code (?P<code>\d+)")
_ENDED: Final = re.compile(r"pod (?P<pod>\S+) ended with exit code (?P<code>\d+)")  # the local backend says more than a cluster
_DISRUPTED: Final = re.compile(r"Pod \S+/(?P<pod>\S+) has condition DisruptionTarget")
_FIRST: Final = re.compile(r"first failed job: (?P<job>[^)\s]+)")
_PLACE: Final = re.compile(r"-(?P<slice>\d+)-(?P<worker>\d+)-[a-z0-9]+$")
_TOLD: Final = re.compile(rf"{ATTEMPT_ENDED} (?P<attempt>\d+): (?P<sentence>.*)")
_CODE: Final = re.compile(r"exited with (\d+)")
_RESTARTS: Final = re.compile(r"applying (?P<action>RestartJobSet\w*) failure policy action")
JOB_FAILURES: Final = ("PodFailurePolicy", "BackoffLimitExceeded")
_PAST: Final = {"Evicted": "evicted", "Preempted": "preempted", "OOMKilling": "killed for its memory"}
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
    # Each restart has a second event, named after the rule.
    decided = [event for event in scene.said(about=f"jobset/{scene.name}") if event.reason.endswith("FailurePolicyAction")]
    decided = [event for event in decided if _RESTARTS.search(event.message)]
    told = {int(found["attempt"]): found["sentence"] for line in scene.log if (found := _TOLD.search(line))}
    last = scene.status.attempt - 1
    pairs = enumerate(zip_longest(decided, decided[1:]))
    return [_ended(scene, event, before, told.get(last - age, ""), last - age) for age, (event, before) in pairs]


def _ended(scene: Scene, event: Event, before: Event | None, told: str, attempt: int) -> Ended:
    """From what was said between the restart `before` it and this one, what the trainer `told` of the attempt that ended, and
    those of its pods that have not been removed yet."""
    first = _FIRST.search(event.message)
    job = first["job"] if first else ""
    failures = [said for said in scene.said(about=f"job/{job}") if said.reason in JOB_FAILURES and _between(said, before, event)]
    cause = failures[0] if failures else None
    words = cause.message if cause else ""
    exited, disrupted = _EXITED.search(words) or _ENDED.search(words), _DISRUPTED.search(words)
    found = exited or disrupted
    pods = f"pod/{found['pod']}" if found else f"pod/{job}-"
    said = [said for said in scene.said(about="pod") if said.reason in KILLERS and said.about.startswith(pods)]
    killers = [killer for killer in said if _between(killer, before, event)]
    code = int(exited["code"]) if exited else None
    if killers:
        who = where(killers[-1].about.partition("/")[2])
        sentence = f"{who} was {_PAST.get(killers[-1].reason, 'taken away')}: {one_line(killers[-1].message)}"
    elif found and code is not None:
        sentence = f"{where(found['pod'])} exited with {explain_exit(code)}"
    elif found:
        sentence = f"{where(found['pod'])} was taken away (drain, eviction, preemption or a deleted node)"
    elif told:
        sentence, code = one_line(told), int(said_code[1]) if (said_code := _CODE.search(told)) else None
    elif (pod := first_to_end(pod for pod in scene.status.pods if pod.attempt == attempt)) and pod.exit_code is not None:
        sentence, code = f"{where(pod.name)} exited with {explain_exit(pod.exit_code)}", pod.exit_code
    else:
        sentence = f"{job or 'a slice'} failed with a code that counts against the budget, and the cluster keeps no more of a replaced pod"
    free = "IgnoreMaxRestarts" in event.message
    return Ended(at=event.at, free=free, exit_code=code, sentence=sentence, evidence=(*killers[-1:], *failures[:1], event))


def _between(said: Event, before: Event | None, event: Event) -> bool:
    return bool(said.at and event.at and said.at <= event.at and (before is None or before.at is None or said.at > before.at))


def where(pod: str) -> str:
    """`slice 0, worker 1` of a pod's name."""
    found = _PLACE.search(pod)
    return f"slice {found['slice']}, worker {found['worker']}" if found else f"pod {pod}"
