"""Why pods are not even made: what admission said to the Job controller, which tries again and again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from launcher.backend.scene import Scene
from launcher.backend.status import Event
from launcher.observe.cause import Cause, counted, one_line, pods_of, said_by

FOLLOWER: Final = "follower pod node selector for topology domain not found"
_TRANSIENT: Final = re.compile(r"admission webhook \"m(pod|job)\.kb\.io\" denied the request: .* not found|object has been modified")
"""Kueue's cache is behind for a moment after a Job or JobSet was made."""

_SECURITY: Final = re.compile(r'violates PodSecurity "(?P<level>[^":]+)[^"]*": (?P<why>.*)')
_QUOTA: Final = re.compile(r"exceeded quota: (?P<quota>[^,]+), requested: (?P<asked>.+), used: (?P<used>.+), limited: (?P<limit>.+)")
_LIMIT: Final = re.compile(r"(?P<why>(?:maximum|minimum) \S+ usage per \w+ is .*|(?:cpu|memory) max limit to request ratio .*)")
_PRIORITY: Final = re.compile(r"no PriorityClass with name (?P<name>\S+) was found")
_ACCOUNT: Final = re.compile(r'serviceaccount "(?P<name>[^"]+)" not found')
_UNREACHABLE: Final = re.compile(r'failed calling webhook "(?P<name>[^"]+)":(?P<why>.*)', re.DOTALL)
_DENIED: Final = re.compile(r'admission webhook "(?P<name>[^"]+)" denied the request: (?P<why>.*)', re.DOTALL)


def passes(event: Event) -> bool:
    """Whether it belongs to the start of every job with exclusive placement or a queue: the next try brings the pod."""
    return FOLLOWER in event.message or _TRANSIENT.search(event.message) is not None


def refusals(scene: Scene) -> Iterator[Cause]:
    """The newest refusal of each Job that still lacks pods."""
    missing = scene.status.hosts - len(pods_of(scene))
    if missing <= 0:
        return
    said = [*scene.said(about="job", reason="FailedCreate"), *scene.said(about=f"jobset/{scene.name}", reason="JobCreationFailed")]
    for event in said:
        if not passes(event):
            yield _refusal(scene, event, missing)


def waits_for_leader(scene: Scene) -> Iterator[Cause]:
    """Exclusive placement: a slice's pod 0 chooses the node pool, the others are made after that. Only where nothing else is wrong."""
    waiting = [event for event in scene.said(about="job", reason="FailedCreate") if FOLLOWER in event.message]
    if waiting and len(pods_of(scene)) < scene.status.hosts:
        yield Cause(
            code="waits-for-leader",
            sentence=f"the other hosts of {waiting[0].about.partition('/')[2]} wait until its worker 0 has a node, which chooses the pool",
            fix="wait a moment and look again",
            evidence=said_by(waiting[0]),
        )


def _refusal(scene: Scene, event: Event, missing: int) -> Cause:
    code, sentence, fix = _meaning(scene, event.message)
    return Cause(code=code, sentence=f"{counted(missing, 'pod')} cannot be created: {sentence}", fix=fix, evidence=said_by(event))


def _meaning(scene: Scene, words: str) -> tuple[str, str, str]:
    """Code, sentence, fix."""
    here = f"-n {scene.namespace}"
    if found := _SECURITY.search(words):
        return (
            "pod-security",
            f"namespace {scene.namespace!r} enforces Pod Security level {found['level']!r}, which forbids {one_line(found['why'])}",
            "submit without what it forbids (`security` and `host_network` of the spec), or in a namespace with a lower level: "
            f"kubectl get namespace {scene.namespace} --show-labels",
        )
    if found := _QUOTA.search(words):
        return (
            "namespace-quota",
            f"the namespace's resource quota {found['quota']!r} is used up: {found['asked']} asked, {found['used']} used, "
            f"{found['limit']} allowed",
            f"end other jobs, ask for less, or have the quota raised: kubectl describe resourcequota {found['quota']} {here}",
        )
    if found := _PRIORITY.search(words):
        return (
            "no-priority-class",
            f"priority class {found['name']!r} does not exist",
            "set `priority` of the spec to one there is (kubectl get priorityclasses) or leave it out",
        )
    if found := _ACCOUNT.search(words):
        return (
            "no-service-account",
            f"service account {found['name']!r} does not exist in namespace {scene.namespace!r}",
            f"kubectl create serviceaccount {found['name']} {here}, or leave `service_account` out of the spec",
        )
    if found := _UNREACHABLE.search(words):
        return (
            "webhook-down",
            f"admission webhook {found['name']!r} does not answer: {one_line(found['why'])}",
            "an administrator repairs or removes it: kubectl get validatingwebhookconfigurations,mutatingwebhookconfigurations; "
            "its pods: kubectl get pods -A | grep -i admission",
        )
    if found := _LIMIT.search(words):
        return (
            "pod-limits",
            f"the namespace limits pods: {one_line(found['why'])}",
            f"change `resources` of the spec, or have the limit changed: kubectl describe limitrange {here}",
        )
    if found := _DENIED.search(words):
        return (
            "denied",
            f"admission webhook {found['name']!r} refuses them: {one_line(found['why'])}",
            "change what it names in the spec, or ask whoever runs the webhook",
        )
    return "refused", one_line(words.removeprefix("Error creating: ")), f"kubectl describe job {here}"
