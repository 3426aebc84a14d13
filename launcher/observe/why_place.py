"""Why a pod has no node: from the nodes themselves, since the scheduler's sentence only counts and may be old."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

from launcher.backend.scene import Scene
from launcher.backend.status import JOBSET_NAME_LABEL, Manifest
from launcher.backend.values import items, mapping, strings
from launcher.labels import ACCELERATOR_LABEL, TOPOLOGY_LABEL
from launcher.observe.cause import Cause, Pod, counted, named, one_line, pods_of
from launcher.observe.quantity import quantity

POOL_LABEL: Final = "cloud.google.com/gke-nodepool"
RESOURCE: Final = "google.com/tpu"
_NO_CLAIM: Final = re.compile(r'persistentvolumeclaim "(?P<name>[^"]+)" not found')


def no_place(scene: Scene) -> Iterator[Cause]:
    """For the first pod of each slice that has no node."""
    waiting = [pod for pod in pods_of(scene) if pod.status.node is None and pod.status.phase == "Pending" and not pod.status.leaving]
    for pod in waiting[:1] + [pod for before, pod in pairwise(waiting) if _slice(before) != _slice(pod)]:
        evidence = _scheduler_says(pod)
        for code, sentence, fix in _meanings(scene, pod, len(waiting)):
            yield Cause(code=code, sentence=sentence, fix=fix, evidence=evidence)


def lost_nodes(scene: Scene) -> Iterator[Cause]:
    """Nodes that no longer answer, under pods that are said to run."""
    health = {node["metadata"]["name"]: _ready(node) for node in scene.nodes}
    lost = [pod for pod in pods_of(scene) if pod.status.phase == "Running" and pod.status.node and not _healthy(health, pod)]
    if not lost:
        return
    gone = named([f"{pod.status.node} ({pod.where})" for pod in lost])
    node = lost[0].status.node or ""
    condition = health.get(node)
    words = f"{condition.get('reason')}: {one_line(str(condition.get('message')))}" if condition else "the node object is gone"
    yield Cause(
        code="node-not-ready",
        sentence=f"{counted(len(lost), 'host')} of running pods not ready: {gone}; the job hangs or restarts when Kubernetes gives them up",
        fix=f"kubectl describe node {node}; if it does not come back: kubectl delete node {node}, and the job restarts elsewhere for free",
        evidence=(f"node/{node}: {words}",),
    )


def _healthy(health: dict[str, Manifest], pod: Pod) -> bool:
    if pod.status.ready or not health:
        return True
    return health.get(pod.status.node or "", {}).get("status") == "True"


def _meanings(scene: Scene, pod: Pod, waiting: int) -> Iterator[tuple[str, str, str]]:
    scheduled = pod.conditions.get("PodScheduled", {})
    words, here = str(scheduled.get("message", "")), f"-n {scene.namespace}"
    gates = [str(gate["name"]) for gate in items(pod.spec.get("schedulingGates"))]
    if gates:
        own = any(gate.startswith("kueue.x-k8s.io") for gate in gates)
        fix = "wait: Kueue removes its gate when it has a place" if own else f"whoever set it removes it: kubectl get pods {here} -o yaml"
        yield "gated", f"{counted(waiting, 'pod')} held back by scheduling gate {named(gates)}", fix
        return
    scheduler = str(pod.spec.get("schedulerName", "default-scheduler"))
    if not scheduled and scheduler != "default-scheduler":
        yield (
            "no-scheduler",
            f"scheduler {scheduler!r} has not looked at {counted(waiting, 'pod')}: it does not run or does not exist",
            f"leave `scheduler` out of the spec, or have {scheduler!r} started",
        )
    if found := _NO_CLAIM.search(words):
        yield (
            "no-claim",
            f"claim {found['name']!r} does not exist in namespace {scene.namespace!r}",
            f"create it (kubectl get persistentvolumeclaim {here}), or correct `volumes` of the spec",
        )
    if "unbound immediate PersistentVolumeClaims" in words:
        claims = [v["persistentVolumeClaim"]["claimName"] for v in items(pod.spec.get("volumes")) if "persistentVolumeClaim" in v]
        yield (
            "claim-unbound",
            f"claim {' or '.join(map(repr, claims))} is not bound to a volume",
            f"its storage class or a volume is missing: kubectl describe persistentvolumeclaim {here}; kubectl get storageclass",
        )
    if scene.nodes:
        yield from _by_nodes(scene, pod, words, waiting)
    if words:
        look = f"kubectl describe pod {pod.status.name} {here}"
        yield "unschedulable", f"{counted(waiting, 'pod')} {'finds' if waiting == 1 else 'find'} no node: {one_line(words)}", look


def _by_nodes(scene: Scene, pod: Pod, words: str, waiting: int) -> Iterator[tuple[str, str, str]]:
    """Sieve the nodes as the scheduler does; the first sieve that nothing passes is the cause."""
    wanted = _wanted(pod)
    fitting = [node for node in scene.nodes if matches(node, pod)]
    if not fitting:
        yield "no-node", f"no node {_lacking(scene.nodes, pod)}", (
            "have a node pool of this type and topology made, or choose what the cluster has: nnxlaunch types; kubectl get nodes "
            f"-L {ACCELERATOR_LABEL},{TOPOLOGY_LABEL}"
        )  # fmt: skip
        return
    names = [node["metadata"]["name"] for node in fitting]
    alive = [node for node in fitting if _ready(node).get("status") == "True"]
    if not alive:
        yield "node-not-ready", f"all {len(fitting)} nodes with {wanted} are not ready: {named(names)}", f"kubectl describe node {names[0]}"
        return
    open_ = [node for node in alive if not mapping(node.get("spec")).get("unschedulable")]
    if not open_:
        yield "cordoned", f"all {len(alive)} nodes with {wanted} are cordoned: {named(names)}", f"kubectl uncordon {' '.join(names[:8])}"
        return
    tolerated = [node for node in open_ if not untolerated(node, pod)]
    if not tolerated:
        taint = untolerated(open_[0], pod)[0]
        said = f"{taint['key']}{'=' + taint['value'] if taint.get('value') else ''}:{taint['effect']}"
        yield (
            "taint",
            f"all {len(open_)} nodes with {wanted} have the taint {said}, which the job does not tolerate",
            f"add a toleration for it to the spec, use other nodes, or remove it: kubectl taint nodes {names[0]} {said}-",
        )
        return
    asked = _requests(pod)
    for resource, amount in asked.items():
        room = [str(mapping(mapping(node.get("status")).get("allocatable")).get(resource, "0")) for node in tolerated]
        if all(quantity(amount) > quantity(has) for has in room):
            yield (
                "too-big",
                f"no node is large enough: a host asks for {amount} of {resource}, and the largest of {len(room)} has "
                f"{max(room, key=quantity)}",
                "lower `resources` of the spec, or use larger machines",
            )
            return
    if "affinity rules" in words:
        pools = sorted({mapping(node["metadata"].get("labels")).get(POOL_LABEL, "?") for node in tolerated})
        yield (
            "no-free-pool",
            f"slice {pod.status.slice_index} needs a node pool of its own, and none of {named(pools)} with {wanted} is free",
            "wait until another slice or job ends, add a node pool, or submit with fewer slices",
        )
    elif "Insufficient" in words:
        resource = next((word for word in asked if f"Insufficient {word}" in words), RESOURCE)
        holders = _holders(scene, tolerated, resource)
        used = {pod.status.node for pod in pods_of(scene)}
        mine = [node for node in tolerated if node["metadata"]["name"] in used]
        itself = [f"{scene.name} itself ({counted(len(mine), 'node')})"] if mine else []
        whose = (
            f"used by {named(itself + holders)}"
            if itself or holders
            else "this user may not list jobsets to see by whom"
            if "jobsets" in scene.unreadable
            else "used by jobs of other namespaces, or by pods of no JobSet"
        )
        yield (
            "chips-used",
            f"{counted(waiting, 'pod')} {'waits' if waiting == 1 else 'wait'} for {resource}: all "
            f"{counted(len(tolerated), 'node')} with {wanted} are full; {whose}",
            "the job is larger than what there is and waits for itself: submit it with fewer slices or hosts, or have nodes added"
            if len(mine) == len(tolerated) and not holders
            else "wait: they start when others end; or cancel a job, or have nodes added",
        )


def matches(node: Manifest, pod: Pod) -> bool:
    """Whether the node has the labels that the pod asks for."""
    labels = mapping(node["metadata"].get("labels"))
    if any(labels.get(key) != value for key, value in mapping(pod.spec.get("nodeSelector")).items()):
        return False
    affinity = mapping(mapping(pod.spec.get("affinity")).get("nodeAffinity")).get("requiredDuringSchedulingIgnoredDuringExecution")
    terms = items(mapping(affinity).get("nodeSelectorTerms"))
    return not terms or any(all(_expression(labels, rule) for rule in items(term.get("matchExpressions"))) for term in terms)


def _expression(labels: Manifest, rule: Manifest) -> bool:
    value = labels.get(rule["key"])
    match rule["operator"]:
        case "In":
            return value in strings(rule.get("values"))
        case "NotIn":
            return value not in strings(rule.get("values"))
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case _:
            return True  # Gt, Lt: the scheduler knows


def untolerated(node: Manifest, pod: Pod) -> list[Manifest]:
    """Taints that keep the pod away; those of a cordon and of a node that is not ready are told otherwise."""
    taints = [t for t in items(mapping(node.get("spec")).get("taints")) if t["effect"] in ("NoSchedule", "NoExecute")]
    foreign = [t for t in taints if not t["key"].startswith("node.kubernetes.io/")]
    return [taint for taint in foreign if not any(_tolerates(toleration, taint) for toleration in items(pod.spec.get("tolerations")))]


def _tolerates(toleration: Manifest, taint: Manifest) -> bool:
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if toleration.get("operator") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    return toleration.get("key") == taint["key"] and (toleration.get("value") or "") == (taint.get("value") or "")


def _requests(pod: Pod) -> dict[str, str]:
    resources = mapping(pod.spec["containers"][0].get("resources"))
    return {**mapping(resources.get("limits")), **mapping(resources.get("requests"))}


def _wanted(pod: Pod) -> str:
    labels = mapping(pod.spec.get("nodeSelector"))
    if ACCELERATOR_LABEL not in labels:
        return named([f"{key}={value}" for key, value in labels.items()]) or "no label asked for"
    rest = [f"{key}={value}" for key, value in labels.items() if key not in (ACCELERATOR_LABEL, TOPOLOGY_LABEL)]
    topology = f" {labels[TOPOLOGY_LABEL]}" if TOPOLOGY_LABEL in labels else ""
    return f"{labels[ACCELERATOR_LABEL]}{topology}{' and ' + named(rest) if rest else ''}"


def _lacking(nodes: Sequence[Manifest], pod: Pod) -> str:
    """The first label that no node has together with those before it, and what there is instead."""
    left = list(nodes)
    for key, value in mapping(pod.spec.get("nodeSelector")).items():
        having = [node for node in left if mapping(node["metadata"].get("labels")).get(key) == value]
        if not having:
            there = sorted({str(mapping(node["metadata"].get("labels")).get(key, "none")) for node in left})
            return f"has {_wanted(pod)}: {key} is {named(there)} on the {counted(len(left), 'node')} left to choose from"
        left = having
    return f"has {_wanted(pod)} and the affinity that the pod asks for"


def _holders(scene: Scene, nodes: Sequence[Manifest], resource: str) -> list[str]:
    """Jobs of the namespace whose pods may use the resource on these nodes, with the number of their pods there.

    An active Job may itself have found no place: only where none is ready is it named.
    """
    rivals = [rival for rival in scene.rivals if _may_use(rival, nodes, resource)]
    count = "ready" if any(rival["status"]["ready"] for rival in rivals) else "active"
    found: dict[str, int] = {}
    for rival in rivals:
        if hosts := int(rival["status"][count]):
            name = rival["metadata"]["labels"][JOBSET_NAME_LABEL]
            found[name] = found.get(name, 0) + hosts
    return [f"{name} ({counted(count, 'host')})" for name, count in sorted(found.items(), key=lambda pair: -pair[1])]


def _may_use(rival: Manifest, nodes: Sequence[Manifest], resource: str) -> bool:
    asked = mapping(rival["spec"].get("nodeSelector"))
    resources = [mapping(container["resources"]) for container in rival["spec"]["containers"]]
    takes = any(resource in mapping(part.get(kind)) for part in resources for kind in ("requests", "limits"))
    return takes and any(all(mapping(node["metadata"].get("labels")).get(k) == v for k, v in asked.items()) for node in nodes)


def _scheduler_says(pod: Pod) -> tuple[str, ...]:
    words = str(pod.conditions.get("PodScheduled", {}).get("message", ""))
    return (f"pod/{pod.status.name}: {one_line(words)}",) if words else (f"pod/{pod.status.name}: Pending, no node",)


def _ready(node: Manifest) -> Manifest:
    found: list[Manifest] = [c for c in items(mapping(node.get("status")).get("conditions")) if c.get("type") == "Ready"]
    return found[0] if found else {}


def _slice(pod: Pod) -> int:
    return pod.status.slice_index
