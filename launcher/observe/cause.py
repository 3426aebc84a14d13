"""What is the matter with a job, in one sentence, with its evidence and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from launcher.backend.scene import Scene
from launcher.backend.status import Event, Manifest, PodStatus
from launcher.backend.values import items, mapping

ABOUT_A_JOB: Final = re.compile(r"\bnnxlaunch (submit|status|why|logs|events|describe|wait|suspend|resume|restart|cancel|delete)(?= )")
"""Commands that go to a backend."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    code: str
    """Stable, for scripts."""
    sentence: str
    fix: str
    evidence: tuple[str, ...] = ()
    """Each `kind/name: what it says`, the strongest first."""

    def told_with(self, flags: str) -> Cause:
        """With commands that can be pasted: `flags` say again where the job is."""
        return replace(self, fix=ABOUT_A_JOB.sub(rf"\g<0>{flags}", self.fix))


@dataclass(frozen=True)
class Pod:
    """A pod as it was read, and what is known of it."""

    manifest: Manifest
    status: PodStatus

    @property
    def spec(self) -> Manifest:
        return self.manifest["spec"]

    @property
    def conditions(self) -> dict[str, Manifest]:
        return {condition["type"]: condition for condition in items(mapping(self.manifest.get("status")).get("conditions"))}

    @property
    def waiting(self) -> Manifest:
        """Why its container waits: `reason` and perhaps `message`; empty when it does not."""
        for container in items(mapping(self.manifest.get("status")).get("containerStatuses")):
            if waiting := mapping(mapping(container.get("state")).get("waiting")):
                return waiting
        return {}

    @property
    def where(self) -> str:
        return f"slice {self.status.slice_index}, worker {self.status.worker}"

    @property
    def image(self) -> str:
        return self.spec["containers"][0].get("image", "")


def pods_of(scene: Scene) -> list[Pod]:
    """Pods of the present attempt, by slice and worker."""
    return [pod for pod in all_pods_of(scene) if pod.status.attempt == scene.status.attempt]


def all_pods_of(scene: Scene) -> list[Pod]:
    """Those of earlier attempts too."""
    manifests = {manifest["metadata"]["name"]: manifest for manifest in scene.pods}
    return [Pod(manifests[pod.name], pod) for pod in scene.status.pods]


def said_by(*events: Event) -> tuple[str, ...]:
    """Evidence of events, each sentence once."""
    found: dict[str, None] = {}
    for event in events:
        found.setdefault(f"{event.about}: {event.reason}: {one_line(event.message)}")
    return tuple(found)


def condition_line(about: str, condition: Manifest) -> str:
    words = one_line(str(condition.get("message") or ""))
    return f"{about}: {condition.get('type')}={condition.get('status')}, {condition.get('reason') or 'no reason'}: {words}"


def one_line(text: str, limit: int = 400) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def named(things: Sequence[str], limit: int = 4) -> str:
    """`a, b and 3 more`."""
    shown = list(dict.fromkeys(things))
    if len(shown) <= limit:
        return ", ".join(shown)
    return f"{', '.join(shown[:limit])} and {len(shown) - limit} more"


def counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
