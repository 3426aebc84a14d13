"""The rights that the launcher's commands need, by verb; `k8s/cluster/role.yaml` and `view.yaml` grant exactly these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from launcher.doctor.finding import Finding, bad, good, warn


@dataclass(frozen=True, order=True)
class Right:
    """One verb on one resource of one API group (`""`: the core)."""

    group: str
    resource: str  # with its subresource: `pods/log`
    verb: str

    @property
    def said(self) -> str:
        return f"{self.verb} {self.resource}" + (f".{self.group}" if self.group else "")


def _rights(group: str, resources: str, verbs: str) -> tuple[Right, ...]:
    return tuple(Right(group, resource, verb) for resource in resources.split() for verb in verbs.split())


SUBMITTER: Final = (
    *_rights("jobset.x-k8s.io", "jobsets", "get list watch create patch delete"),
    *_rights("batch", "jobs", "get list"),
    *_rights("", "pods", "get list watch"),
    *_rights("", "pods/log", "get"),
    *_rights("", "events", "list"),
    *_rights("", "configmaps serviceaccounts", "get create delete"),
    *_rights("networking.k8s.io", "networkpolicies", "get create delete"),
)
"""In the job's namespace."""

QUEUE_USER: Final = (
    *_rights("kueue.x-k8s.io", "workloads", "list patch"),
    *_rights("kueue.x-k8s.io", "localqueues", "get list"),
    *_rights("visibility.kueue.x-k8s.io", "localqueues/pendingworkloads", "get"),
)
"""In the job's namespace, where jobs queue."""

VIEWER: Final = (
    *_rights("", "nodes", "list"),
    *_rights("", "namespaces", "get"),
    *_rights("kueue.x-k8s.io", "clusterqueues resourceflavors", "get"),
    *_rights("scheduling.k8s.io", "priorityclasses", "list"),
    *_rights("visibility.kueue.x-k8s.io", "clusterqueues/pendingworkloads", "get"),
)
"""Of the whole cluster, read only; without them `why` and `doctor` know less."""


def judge(denied: Iterable[Right], *, namespace: str, queues: bool) -> Iterator[Finding]:
    """Which of the rights are missing, and how they are granted."""
    missing = set(denied)
    wanted = (*SUBMITTER, *(QUEUE_USER if queues else ()))
    without = sorted(missing.intersection(wanted))
    if without:
        command = f"kubectl -n {namespace} apply -f k8s/cluster/role.yaml && kubectl -n {namespace} create rolebinding USER"
        yield bad("rights", f"you may not {_listed(without)} in namespace {namespace}", f"{command} --role=nnxlaunch --user=USER")
    else:
        yield good("rights", f"all {len(wanted)} verbs that the commands need in namespace {namespace}")
    without = sorted(missing.intersection(right for right in VIEWER if queues or "kueue" not in right.group))
    if without:
        command = "kubectl apply -f k8s/cluster/view.yaml && kubectl create clusterrolebinding USER-view"
        yield warn(
            "rights", f"you may not {_listed(without)}: `why` and `doctor` know less", f"{command} --clusterrole=nnxlaunch-view --user=USER"
        )


def _listed(rights: Iterable[Right]) -> str:
    found: dict[str, list[str]] = {}
    for right in rights:
        found.setdefault(right.said.partition(" ")[2], []).append(right.verb)
    return ", ".join(f"{'/'.join(verbs)} {what}" for what, verbs in found.items())
