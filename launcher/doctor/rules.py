"""What API objects mean for jobs: namespace, queues, priorities. Pure functions over what the server answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from launcher.doctor.finding import Finding, bad, good, warn
from launcher.doctor.objects import Manifest, condition, each, labels_of, name_of, part
from launcher.manifest.container import resources
from launcher.manifest.names import XPK_QUEUE
from launcher.manifest.pod import node_selector
from launcher.spec import JobSpec

ENFORCE_LABEL: Final = "pod-security.kubernetes.io/enforce"
LEVELS: Final = ("privileged", "baseline", "restricted")
NEEDED_LEVEL: Final = {"restricted": "restricted", "root_no_caps": "baseline", "privileged": "privileged"}
"""The strictest Pod Security level that admits the pods of each `security`."""
XPK_CLUSTER_QUEUE: Final = "cluster-queue"
XPK_NAMESPACE: Final = "default"
XPK_PRIORITIES: Final = ("very-low", "low", "medium", "high", "very-high")


def pod_security(namespace: Manifest, spec: JobSpec | None) -> Iterator[Finding]:
    """The namespace's Pod Security level against the spec's `security`."""
    name = name_of(namespace)
    level = labels_of(namespace).get(ENFORCE_LABEL)
    if part(namespace, "status").get("phase") == "Terminating":
        yield bad("namespace", f"{name} is being deleted", "use another namespace: -n NAMESPACE")
        return
    wanted = spec.security if spec else "restricted"
    highest = NEEDED_LEVEL[wanted]
    if level in LEVELS and LEVELS.index(level) > LEVELS.index(highest):
        yield bad(
            "namespace",
            f"{name} enforces the Pod Security level {level}, which refuses `security: {wanted}`",
            f"set `security: restricted` in the spec, or: kubectl label namespace {name} {ENFORCE_LABEL}={highest} --overwrite",
        )
    elif level is None:
        yield warn(
            "namespace",
            f"{name} enforces no Pod Security level: any pod may run there",
            f"kubectl label namespace {name} {ENFORCE_LABEL}={highest}",
        )
    else:
        yield good("namespace", f"{name} enforces the Pod Security level {level}, which admits `security: {wanted}`")


def queues(
    spec: JobSpec | None, namespace: str, local: Sequence[Manifest], clusters: Mapping[str, Manifest | None], flavors: Sequence[Manifest]
) -> Iterator[Finding]:
    """The local queues of the namespace, and whether the spec's queue can ever admit it.

    `clusters`: cluster queues by name, None where there is none of the name; without an entry it could not be read.
    """
    by_name = {name_of(queue): queue for queue in local}
    if spec is not None and spec.queue is not None and spec.queue.name not in by_name:
        there = f"; there are: {', '.join(sorted(by_name))}" if by_name else "; there is none"
        fix = f"change `queue` in the spec, or: kubectl -n {namespace} apply -f k8s/cluster/queue.yaml"
        yield bad("queue", f"namespace {namespace} has no LocalQueue {spec.queue.name!r}{there}", fix)
    if spec is not None and spec.queue is None and by_name:
        names = ", ".join(sorted(by_name))
        yield warn(
            "queue", f"the spec names no queue, so the job takes chips beside Kueue's quota; there are: {names}", "set `queue: NAME`"
        )
    if spec is None and not by_name:
        yield good("queue", f"namespace {namespace} has no LocalQueue; jobs without `queue` start at once")
    for name, queue in sorted(by_name.items()):
        if spec is None or (spec.queue is not None and spec.queue.name == name):
            yield _queue(spec, queue, clusters, flavors)


def _queue(spec: JobSpec | None, local: Manifest, clusters: Mapping[str, Manifest | None], flavors: Sequence[Manifest]) -> Finding:
    name, target = name_of(local), local["spec"]["clusterQueue"]
    namespace = local["metadata"].get("namespace", "default")
    if target not in clusters:
        active = condition(local, "Active")
        if active.get("status") == "False":
            return bad("queue", f"{name} is not active: {active.get('message')}", f"kubectl -n {namespace} describe localqueue {name}")
        return good("queue", f"{name} leads to cluster queue {target}, which you may not read")
    cluster = clusters[target]
    if cluster is None:
        return bad(
            "queue", f"{name} leads to cluster queue {target}, which does not exist", f"kubectl -n {namespace} edit localqueue {name}"
        )
    for where, thing in ((f"localqueue {name}", local), (f"clusterqueue {target}", cluster)):
        active = condition(thing, "Active")
        if active.get("status") == "False":
            return bad("queue", f"{where} is not active: {active.get('message')}", f"kubectl -n {namespace} describe {where}")
    groups = each(cluster, "spec", "resourceGroups")
    covered = {resource for group in groups for resource in group["coveredResources"]}
    if spec is None:
        return good("queue", f"{name} is active and covers {', '.join(sorted(covered))}")
    missing = sorted(requested(spec) - covered)
    if missing:
        fix = f"have it added: kubectl edit clusterqueue {target}" + (
            "; or leave `resources` out" if set(missing) <= {"cpu", "memory"} else ""
        )
        return bad("queue", f"{name} does not cover {', '.join(missing)}, which the pods request: the job would wait for ever", fix)
    used = [flavor["name"] for group in groups for flavor in group["flavors"]]
    mine = [flavor for flavor in flavors if name_of(flavor) in used]
    if mine and not any(_serves(flavor, spec) for flavor in mine):
        labels = "; ".join(f"{name_of(flavor)} {part(flavor, 'spec', 'nodeLabels')}" for flavor in mine)
        return bad("queue", f"no flavor of {name} has the nodes the job asks for: {labels}", "use another queue or another `tpu`")
    return good("queue", f"{name} is active and covers {', '.join(sorted(requested(spec)))}")


def _serves(flavor: Manifest, spec: JobSpec) -> bool:
    """Kueue's rule: a node selector that names a label of the flavor must name its value."""
    labels, selector = part(flavor, "spec", "nodeLabels"), node_selector(spec)
    return all(selector.get(key, value) == value for key, value in labels.items())


def requested(spec: JobSpec) -> set[str]:
    """Resources that a pod of the job requests."""
    return set(resources(spec).get("requests", {}))


def priorities(spec: JobSpec, classes: Sequence[Manifest]) -> Iterator[Finding]:
    if spec.priority is None:
        return
    names = sorted(name_of(thing) for thing in classes)
    if spec.priority in names:
        yield good("priority", f"the PriorityClass {spec.priority} exists")
    else:
        yield bad("priority", f"there is no PriorityClass {spec.priority!r}", f"take one of {', '.join(names)}, or leave `priority` out")


def xpk(spec: JobSpec | None, namespace: str, xpk_queues: Sequence[Manifest], classes: Sequence[Manifest]) -> Iterator[Finding]:
    """A cluster that XPK has made: its queue, namespace and priorities. `xpk_queues`: the local queues of XPK's namespace."""
    found = [queue for queue in xpk_queues if name_of(queue) == XPK_QUEUE and queue["spec"]["clusterQueue"] == XPK_CLUSTER_QUEUE]
    if not found:
        return
    names = {name_of(thing) for thing in classes}
    order = [name for name in XPK_PRIORITIES if name in names]
    ranks = f", priorities {', '.join(order)}" if order else ""
    said = f"XPK made this cluster: queue {XPK_QUEUE} in namespace {XPK_NAMESPACE}{ranks}"
    if namespace != XPK_NAMESPACE:
        yield warn("xpk", f"{said}; namespace {namespace} has no part in it", f"submit with -n {XPK_NAMESPACE} and `queue: {XPK_QUEUE}`")
    elif spec is not None and (spec.queue is None or spec.queue.name != XPK_QUEUE):
        yield warn(
            "xpk", f"{said}; the spec does not use it", f"set `queue: {XPK_QUEUE}`" + (", `priority: medium`" if "medium" in order else "")
        )
    else:
        yield good("xpk", said)
