"""Why a queued job is not admitted: a reading of Kueue's Workload, LocalQueue and ClusterQueue.

Kueue's words are those of 0.17 and 0.18; what is not recognised is passed on as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from launcher.backend.scene import Scene
from launcher.backend.status import Manifest
from launcher.backend.values import items, mapping
from launcher.observe.cause import Cause, condition_line, named, one_line
from launcher.observe.quantity import quantity

_UNUSED: Final = re.compile(r"insufficient unused quota for (?P<resource>\S+) in flavor (?P<flavor>\S+), (?P<more>\S+) more needed")
_MAXIMUM: Final = re.compile(
    r"insufficient quota for (?P<resource>\S+) in flavor (?P<flavor>\S+),"
    r".*?request \((?P<asked>[^)]+)\) > maximum capacity \((?P<limit>[^)]+)\)"
)
_NOT_COVERED: Final = re.compile(r"resource (?P<resource>\S+) unavailable in ClusterQueue")
_AFFINITY: Final = re.compile(r"flavor (?P<flavor>\S+) doesn't match node affinity")
_TAINT: Final = re.compile(r"untolerated taint \{(?P<taint>[^}]+)\} in flavor (?P<flavor>\S+)")
_TOPOLOGY: Final = re.compile(r'topology "(?P<topology>[^"]+)" (?:doesn\'t allow to fit|allows to fit only).*')
_PREEMPTED: Final = re.compile(r"accommodate a workload \(UID: (?P<workload>[^,)]+), JobUID: (?P<job>[^)]+)\)(?: due to (?P<why>[^;]+))?")


def queue_causes(scene: Scene) -> Iterator[Cause]:
    """The dominant cause first."""
    conditions = _conditions(scene.workload)
    yield from _no_queue(scene)
    yield from _not_active(scene, conditions)
    if scene.workload is None:
        yield _no_workload(scene)
        return
    yield from _evicted_for_good(scene, conditions)
    yield from _preempted(scene, conditions)  # before what follows: its quota stays reserved for a moment
    yield from _waits_for_checks(scene, conditions)
    yield from _no_quota(scene, conditions)
    yield _in_line(scene, conditions)


def _no_queue(scene: Scene) -> Iterator[Cause]:
    if scene.is_absent("api", "kueue"):
        yield Cause(
            code="no-kueue",
            sentence=f"the job names queue {scene.queue!r}, but this cluster has no Kueue; nothing will ever start it",
            fix="leave `queue` out of the spec, or have an administrator install Kueue",
            evidence=(f"jobset/{scene.name}: suspended, label kueue.x-k8s.io/queue-name={scene.queue}",),
        )
    if scene.is_absent("localqueue", scene.queue) and scene.workload is not None:
        yield Cause(
            code="no-local-queue",
            sentence=f"queue {scene.queue!r} does not exist in namespace {scene.namespace!r}",
            fix=f"see which there are: kubectl get localqueues -n {scene.namespace}; then submit with the right `queue`, or have it made",
            evidence=_workload_says(scene),
        )
    if scene.local_queue and not scene.cluster_queue and scene.is_absent("clusterqueue", cluster_of(scene)):
        yield Cause(
            code="no-cluster-queue",
            sentence=f"queue {scene.queue!r} leads to cluster queue {cluster_of(scene)!r}, which does not exist",
            fix=f"an administrator makes the cluster queue, or corrects it: kubectl edit localqueue {scene.queue} -n {scene.namespace}",
            evidence=(*_queue_says(scene), *_workload_says(scene)),
        )


def _not_active(scene: Scene, conditions: dict[str, Manifest]) -> Iterator[Cause]:
    """A queue that takes no new work; what it has admitted already goes on."""
    local, cluster = _conditions(scene.local_queue).get("Active", {}), _conditions(scene.cluster_queue).get("Active", {})
    name = cluster_of(scene)
    if mapping(scene.cluster_queue).get("spec", {}).get("stopPolicy", "None") != "None" or cluster.get("reason") == "Stopped":
        yield Cause(
            code="queue-stopped",
            sentence=f"cluster queue {name!r} is stopped by an administrator",
            fix=f"ask for `stopPolicy: None`: kubectl edit clusterqueue {name}",
            evidence=_queue_says(scene),
        )
    elif cluster.get("status") == "False":
        reason, words = str(cluster.get("reason")), str(cluster.get("message"))
        missing = one_line(words.partition("references missing ")[2] or words).rstrip(".")
        check = "AdmissionCheck" in reason
        command = (
            f"kubectl get admissioncheck; kubectl describe clusterqueue {name}"
            if check
            else f"kubectl get resourceflavor; kubectl edit clusterqueue {name}"
        )
        yield Cause(
            code="admission-check" if check else "queue-inactive",
            sentence=f"cluster queue {name!r} is not active: "
            + (f"its admission check is missing or not working ({missing})" if check else _plain_reason(reason, missing)),
            fix=f"an administrator repairs it: {command}",
            evidence=(*_queue_says(scene), *_workload_says(scene)),
        )
    if local.get("reason") == "Stopped":
        yield Cause(
            code="queue-stopped",
            sentence=f"local queue {scene.queue!r} is stopped",
            fix=f"ask for `stopPolicy: None`: kubectl edit localqueue {scene.queue} -n {scene.namespace}",
            evidence=_queue_says(scene),
        )
    elif local.get("status") == "False" and cluster.get("status") != "True":
        yield Cause(
            code="queue-inactive",
            sentence=f"queue {scene.queue!r} is not active: {one_line(str(local.get('message')))}",
            fix=f"kubectl describe localqueue {scene.queue} -n {scene.namespace}",
            evidence=_queue_says(scene),
        )
    reserved = str(conditions.get("QuotaReserved", {}).get("message", ""))
    if "namespace doesn't match" in reserved:
        yield Cause(
            code="wrong-namespace",
            sentence=f"cluster queue {name!r} does not admit jobs of namespace {scene.namespace!r}",
            fix=f"submit in a namespace that it admits, or have its namespaceSelector changed: kubectl get clusterqueue {name} -o yaml",
            evidence=_workload_says(scene),
        )


def _plain_reason(reason: str, missing: str) -> str:
    match reason:
        case "FlavorNotFound":
            return f"a resource flavor it needs does not exist ({missing})"
        case "TopologyNotFound":
            return f"a topology it needs does not exist ({missing})"
        case _:
            return missing


def _no_workload(scene: Scene) -> Cause:
    return Cause(
        code="no-workload",
        sentence=f"the job is suspended for queue {scene.queue!r}, but Kueue has made no Workload for it, so nothing will start it",
        fix="Kueue is down, does not manage this namespace, or was installed before JobSet: kubectl -n kueue-system get pods; "
        "an administrator restarts it with: kubectl -n kueue-system rollout restart deployment/kueue-controller-manager",
        evidence=(
            f"jobset/{scene.name}: suspended since {scene.jobset['metadata'].get('creationTimestamp')}; no Workload has it as owner",
        ),
    )


def _evicted_for_good(scene: Scene, conditions: dict[str, Manifest]) -> Iterator[Cause]:
    if mapping(scene.workload).get("spec", {}).get("active", True):
        return
    evicted = conditions.get("Evicted", {})
    if "MaximumExecutionTime" in str(evicted.get("reason")):
        yield Cause(
            code="time-over",
            sentence="the job has used up its `queue.max_run_seconds`; Kueue has stopped it and will not start it again",
            fix="submit it again with a larger queue.max_run_seconds and --replace; it resumes from its last checkpoint",
            evidence=_workload_says(scene, "Evicted"),
        )
    name = mapping(scene.workload)["metadata"]["name"]
    said = one_line(str(evicted.get("message", "")))
    yield Cause(
        code="deactivated",
        sentence="the job is taken out of the queue (its Workload is not active), as nnxlaunch suspend does"
        + (f": {said}" if said not in ("", "The workload is deactivated") else ""),
        fix=f"when its reason is gone: nnxlaunch resume {scene.name}",
        evidence=(f"workload/{name}: spec.active=false", *_workload_says(scene, "Evicted")),
    )


def _waits_for_checks(scene: Scene, conditions: dict[str, Manifest]) -> Iterator[Cause]:
    if conditions.get("QuotaReserved", {}).get("status") != "True":
        return
    checks = [
        check for check in items(mapping(mapping(scene.workload).get("status")).get("admissionChecks")) if check.get("state") != "Ready"
    ]
    if checks:
        said = [
            f"{check['name']} is {check['state']}" + (f": {one_line(check['message'])}" if check.get("message") else "") for check in checks
        ]
        yield Cause(
            code="admission-check",
            sentence=f"the quota is reserved, but admission check {'; '.join(said)}",
            fix="wait for the check's controller (for capacity of DWS this can be hours), or look at it: "
            f"kubectl describe admissioncheck {checks[0]['name']}",
            evidence=tuple(f"workload/{mapping(scene.workload)['metadata']['name']}: admission check {line}" for line in said),
        )
    else:
        yield Cause(
            code="starting",
            sentence=f"queue {scene.queue!r} has admitted the job; its pods are about to be made",
            fix="nothing: it starts in a moment",
            evidence=_workload_says(scene),
        )


def _preempted(scene: Scene, conditions: dict[str, Manifest]) -> Iterator[Cause]:
    """Evicted by Kueue for the sake of another job, and back in the queue."""
    evicted = conditions.get("Evicted", {})
    found = _PREEMPTED.search(str(evicted.get("message", "")))
    if evicted.get("status") != "True" or not found:
        return
    by = next((_said(w) for w in scene.workloads if w["metadata"].get("uid") == found["workload"]), "")
    by = by or next(
        (_said(w) for w in scene.workloads if any(o.get("uid") == found["job"] for o in items(w["metadata"].get("ownerReferences")))), ""
    )
    why = {"prioritization in the ClusterQueue": "it has a higher priority"}.get(found["why"] or "", found["why"] or "")
    yield Cause(
        code="preempted-in-queue",
        sentence=f"job {by or 'of another namespace'} took its place in the queue{f': {why}' if why else ''}; "
        "it waits to be admitted again",
        fix="wait: it resumes from its last checkpoint by itself; or submit it with a higher queue.priority",
        evidence=(*_workload_says(scene, "Evicted"), *(line for line in (position_line(scene),) if line)),
    )


def _no_quota(scene: Scene, conditions: dict[str, Manifest]) -> Iterator[Cause]:
    words = str(conditions.get("QuotaReserved", {}).get("message", ""))
    cluster, evidence = cluster_of(scene), _workload_says(scene)
    if found := _NOT_COVERED.search(words):
        yield Cause(
            code="not-covered",
            sentence=f"cluster queue {cluster!r} does not cover {found['resource']}, which the job requests",
            fix=f"choose a queue for it, or have {found['resource']} added to coveredResources of the cluster queue: "
            f"kubectl edit clusterqueue {cluster}",
            evidence=evidence,
        )
    if found := _MAXIMUM.search(words):
        yield Cause(
            code="over-quota",
            sentence=f"the job asks for {found['asked']} of {found['resource']}, more than queue {scene.queue!r} can ever give "
            f"({found['limit']})",
            fix="submit a smaller job (fewer slices), use another queue, or ask for more quota",
            evidence=evidence,
        )
    if found := _UNUSED.search(words):
        users = quota_users(scene, found["resource"])
        yield Cause(
            code="quota-used",
            sentence=f"queue {scene.queue!r} has not enough {found['resource']} free: {found['more']} more is needed"
            + (f"; used by {named(users)}" if users else ""),
            fix="wait: it starts by itself when they end; or cancel one of them, or submit with a higher queue.priority "
            "where the queue preempts",
            evidence=(*evidence, *(line for line in (position_line(scene),) if line)),
        )
    if found := _TOPOLOGY.search(words):
        yield Cause(
            code="topology-full",
            sentence=f"no place for a whole slice: {one_line(found[0])}",
            fix="wait until a slice is free; check that nodes of this topology exist: nnxlaunch explain JOB.yaml, kubectl get nodes",
            evidence=evidence,
        )
    if found := _AFFINITY.search(words):
        yield Cause(
            code="flavor-mismatch",
            sentence=f"no flavor of cluster queue {cluster!r} is for the nodes the job asks for: {found['flavor']} has other labels",
            fix="use another queue, or compare the job's TPU type with the flavor's nodeLabels: "
            f"kubectl get resourceflavor {found['flavor']} -o yaml",
            evidence=evidence,
        )
    if found := _TAINT.search(words):
        key, value, effect, *_ = [*found["taint"].split(), "", ""]
        yield Cause(
            code="flavor-taint",
            sentence=f"the nodes of flavor {found['flavor']} have the taint {key}={value}:{effect}, which the job does not tolerate",
            fix=f"use another queue, or have a toleration added to the flavor: kubectl edit resourceflavor {found['flavor']}",
            evidence=evidence,
        )


def _in_line(scene: Scene, conditions: dict[str, Manifest]) -> Cause:
    place = position(scene)
    words = one_line(str(conditions.get("QuotaReserved", {}).get("message", "")))
    ahead = [_pending_name(scene, item) for item in scene.pending if place is not None and item.get("positionInClusterQueue", 0) < place]
    if ahead:
        return Cause(
            code="behind-others",
            sentence=f"the job is number {(place or 0) + 1} in its queue, behind {named(ahead)}",
            fix="wait: it starts by itself; or submit it with a higher queue.priority",
            evidence=(position_line(scene), *_workload_says(scene)),
        )
    return Cause(
        code="in-queue",
        sentence=f"waiting in queue {scene.queue!r}" + (f": {words}" if words else "; Kueue has not looked at it yet"),
        fix=f"wait a moment and look again; Kueue's own view: kubectl describe workload -n {scene.namespace}",
        evidence=_workload_says(scene),
    )


def cluster_of(scene: Scene) -> str:
    return mapping(mapping(scene.local_queue).get("spec")).get("clusterQueue", "")


def position(scene: Scene) -> int | None:
    """Jobs before it in the cluster queue; None where that is not known."""
    own = mapping(mapping(scene.workload).get("metadata")).get("name")
    found = (item for item in scene.pending if item["metadata"]["name"] == own and item["metadata"].get("namespace") == scene.namespace)
    return next((int(item.get("positionInClusterQueue", 0)) for item in found), None)


def position_line(scene: Scene) -> str:
    place = position(scene)
    return "" if place is None else f"clusterqueue/{cluster_of(scene)}: position {place + 1} of {len(scene.pending)} waiting"


def quota_users(scene: Scene, resource: str) -> list[str]:
    """`job (40m)` of each that holds quota of `resource` in the cluster queue, the largest first."""
    found: list[tuple[float, str]] = []
    for workload in scene.workloads:
        admission = mapping(mapping(workload.get("status")).get("admission"))
        if admission.get("clusterQueue") != cluster_of(scene):
            continue
        amounts = [str(mapping(part.get("resourceUsage")).get(resource, "0")) for part in items(admission.get("podSetAssignments"))]
        if any(quantity(amount) for amount in amounts):
            found.append((sum(map(quantity, amounts)), f"{_said(workload, scene.namespace)} ({' + '.join(amounts)})"))
    return [words for _, words in sorted(found, reverse=True)]


def _said(workload: Manifest, home: str = "") -> str:
    owner = next((owner["name"] for owner in items(workload["metadata"].get("ownerReferences"))), workload["metadata"]["name"])
    place = workload["metadata"].get("namespace", "")
    return owner if place in ("", home) else f"{place}/{owner}"


def _pending_name(scene: Scene, item: Manifest) -> str:
    return _said(item, scene.namespace)


def _conditions(thing: Manifest | None) -> dict[str, Manifest]:
    return {condition["type"]: condition for condition in items(mapping(mapping(thing).get("status")).get("conditions"))}


def _workload_says(scene: Scene, kind: str = "QuotaReserved") -> tuple[str, ...]:
    condition = _conditions(scene.workload).get(kind)
    if scene.workload is None or condition is None:
        return ()
    return (condition_line(f"workload/{scene.workload['metadata']['name']}", condition),)


def _queue_says(scene: Scene) -> tuple[str, ...]:
    found: list[str] = []
    for about, thing in ((f"clusterqueue/{cluster_of(scene)}", scene.cluster_queue), (f"localqueue/{scene.queue}", scene.local_queue)):
        condition = _conditions(thing).get("Active")
        if condition and condition.get("status") != "True":
            found.append(condition_line(about, condition))
    return tuple(found)
