"""TPU nodes against the accelerator table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from launcher.doctor.finding import Finding, bad, good, warn
from launcher.doctor.objects import Manifest, condition, labels_of, name_of, part
from launcher.labels import ACCELERATOR_LABEL, TOPOLOGY_LABEL
from launcher.manifest.pod import node_selector
from launcher.spec import JobSpec
from launcher.tpu import Slice, TpuError, find_family, resolve_topology
from launcher.tpu.table import RESOURCE, parse_topology

POOL_LABEL: Final = "cloud.google.com/gke-nodepool"


def node_pools(nodes: Sequence[Manifest], spec: JobSpec | None) -> Iterator[Finding]:
    """Every pool of TPU nodes: a type of the table, whole, ready; and whether there are enough for the spec."""
    pools: dict[tuple[str, str, str], list[Manifest]] = {}
    for node in nodes:
        labels = labels_of(node)
        if ACCELERATOR_LABEL in labels:
            key = (labels[ACCELERATOR_LABEL], labels.get(TOPOLOGY_LABEL, ""), labels.get(POOL_LABEL, name_of(node)))
            pools.setdefault(key, []).append(node)
    whole: dict[tuple[str, str], int] = {}
    for (accelerator, topology, pool), members in sorted(pools.items()):
        finding, slices = _pool(accelerator, topology, pool, members)
        whole[accelerator, topology] = whole.get((accelerator, topology), 0) + slices
        if finding:
            yield finding
    for (accelerator, topology), slices in sorted(item for item in whole.items() if item[1]):
        yield good("nodes", f"{accelerator} {topology}: {slices} slice{'' if slices == 1 else 's'} ready")
    if spec is not None and spec.layout.tpu is not None:
        yield _enough(spec, nodes)
    elif not pools and spec is None:
        yield warn("nodes", "no node has TPUs", "add a node pool (k8s/README.md), or rely on one that is scaled to zero or made on demand")


def _pool(accelerator: str, topology: str, pool: str, nodes: Sequence[Manifest]) -> tuple[Finding | None, int]:
    """What is wrong with it, if anything, and how many whole slices of it are ready."""
    look = f"kubectl get nodes -l {POOL_LABEL}={pool}"
    chips = sorted({int(part(node, "status", "allocatable").get(RESOURCE, 0)) for node in nodes})
    ready = [node for node in nodes if is_ready(node)]
    try:
        tpu = _slice(accelerator, topology, chips[-1])
    except TpuError as error:
        return bad("nodes", f"pool {pool}: {accelerator} {topology!r} is not in the accelerator table: {error}", "nnxlaunch types"), 0
    if chips != [tpu.chips_per_host]:
        found = "/".join(map(str, chips))
        return warn("nodes", f"pool {pool}: {found} chips a node, {accelerator} {topology} has {tpu.chips_per_host}", f"{look} -o yaml"), 0
    if len(ready) < len(nodes) or len(nodes) % tpu.hosts:
        said = f"pool {pool}: {len(ready)} of {len(nodes)} nodes ready, a {accelerator} {topology} slice has {tpu.hosts}"
        return warn("nodes", said, f"{look}; kubectl uncordon NODE"), len(ready) // tpu.hosts
    return None, len(ready) // tpu.hosts


def _slice(accelerator: str, topology: str, chips: int) -> Slice:
    """The table's entry; where a topology can be built of several machines, the one with so many chips. Raises TpuError."""
    try:
        return resolve_topology(accelerator, topology)
    except TpuError as error:
        if error.code != "tpu-ambiguous":
            raise
    machines = dict(find_family(accelerator).hosts_of(parse_topology(topology)))
    machine = next((name for name, count in machines.items() if count == chips), next(iter(machines)))
    return resolve_topology(accelerator, topology, machine=machine)


def _enough(spec: JobSpec, nodes: Sequence[Manifest]) -> Finding:
    """Nodes that match all the job selects; pools made on demand or scaled to zero are not seen."""
    selector = node_selector(spec)
    matching = [node for node in nodes if is_ready(node) and all(labels_of(node).get(key) == value for key, value in selector.items())]
    labels = ", ".join(f"{key}={value}" for key, value in sorted(selector.items()))
    said = f"{len(matching)} {'ready node matches' if len(matching) == 1 else 'ready nodes match'} {labels}"
    if len(matching) >= spec.layout.hosts:
        return good("nodes", f"{said}; the job takes {spec.layout.hosts}")
    tpu = spec.layout.tpu
    assert tpu is not None, "a TPU job"
    return warn(
        "nodes",
        f"{said}; the job takes {spec.layout.hosts}, so more must be made on demand",
        f"gcloud container node-pools create NAME --cluster CLUSTER --machine-type {tpu.machine} --tpu-topology {tpu.topology_text} "
        f"--num-nodes {tpu.hosts}",
    )


def is_ready(node: Manifest) -> bool:
    return condition(node, "Ready").get("status") == "True" and not part(node, "spec").get("unschedulable")
