"""The pod template: where it may run, what it is called, what is in it."""

from __future__ import annotations

from typing import Any, Final

from launcher.labels import ACCELERATOR_LABEL, DEFAULT_CONTAINER_ANNOTATION, SPOT_LABEL, TOPOLOGY_LABEL
from launcher.manifest import names
from launcher.manifest.container import container, pod_security_context
from launcher.manifest.volumes import volumes
from launcher.spec import JobSpec
from launcher.spec.capacity import Dws, FlexStart, Reservation, Spot, SuperSlice, Tas
from launcher.spec.pod import GcsFuse
from launcher.tpu.table import ACCELERATOR_COUNT_LABEL, RESOURCE, Slice, format_topology

Manifest = dict[str, Any]

FLEX_START_LABEL: Final = "cloud.google.com/gke-flex-start"
QUEUED_TAINT: Final = "cloud.google.com/gke-queued"
RESERVATION_LABEL: Final = "cloud.google.com/reservation"
PLACEMENT_POLICY_LABEL: Final = "cloud.google.com/placement-policy-name"


def pod_template(spec: JobSpec) -> Manifest:
    return {"metadata": {"labels": names.labels(spec), "annotations": pod_annotations(spec)}, "spec": pod(spec)}


def pod(spec: JobSpec) -> Manifest:
    host_network = spec.network.host_network
    secrets = [{"name": name} for name in spec.container_image.pull_secrets]
    return {
        "restartPolicy": "Never",  # JobSet's own default, OnFailure, would let ranks restart alone
        "terminationGracePeriodSeconds": spec.grace,
        "serviceAccountName": names.service_account(spec),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        **({"hostNetwork": True} if host_network else {}),
        "dnsPolicy": "ClusterFirstWithHostNet" if host_network else "ClusterFirst",
        **({"priorityClassName": spec.priority} if spec.priority else {}),
        **({"schedulerName": spec.scheduler} if spec.scheduler else {}),
        **({"nodeSelector": selector} if (selector := node_selector(spec)) else {}),
        **({"tolerations": taints} if (taints := tolerations(spec)) else {}),
        "securityContext": pod_security_context(spec),
        **({"imagePullSecrets": secrets} if secrets else {}),
        "containers": [container(spec)],
        "volumes": volumes(spec),
    }


def pod_annotations(spec: JobSpec) -> dict[str, str]:
    found = {**spec.annotations, DEFAULT_CONTAINER_ANNOTATION: "trainer"}
    if any(isinstance(volume, GcsFuse) for volume in spec.volumes):
        found[names.GCSFUSE_ANNOTATION] = "true"
    return {**found, **_topology_request(spec)}


def _topology_request(spec: JobSpec) -> dict[str, str]:
    """Kueue's topology-aware scheduling: each slice inside one domain of the level."""
    placement, tpu = spec.placed, spec.layout.tpu
    if not isinstance(placement, Tas | SuperSlice):
        return {}
    level = (placement.level if isinstance(placement, Tas) else None) or (partition_level(tpu) if tpu else "")
    if spec.layout.slices == 1:
        found = {names.TAS_REQUIRED_ANNOTATION: level}
    else:
        found = {names.TAS_SLICE_ANNOTATION: level, names.TAS_SLICE_SIZE_ANNOTATION: str(spec.layout.hosts_per_slice)}
    if isinstance(placement, SuperSlice) and tpu is not None:
        found[names.TPU_SLICE_TOPOLOGY_ANNOTATION] = tpu.topology_text
    return found


def partition_level(tpu: Slice) -> str:
    """The node label GKE gives to a part of a pool that can be such a slice."""
    kind = "partition" if tpu.family.super_slice else "slice"
    return f"cloud.google.com/gke-tpu-{kind}-{format_topology(tpu.topology)}-id"


def node_selector(spec: JobSpec) -> dict[str, str]:
    """The accelerator, then the capacity. Plain CPU hosts have no labels of their own."""
    found: dict[str, str] = {}
    if spec.layout.tpu is not None:
        tpu = spec.layout.tpu
        found[ACCELERATOR_LABEL] = tpu.family.gke_accelerator
        if not isinstance(spec.placed, SuperSlice):
            found[TOPOLOGY_LABEL] = tpu.topology_text
        if tpu.ambiguous:
            found[ACCELERATOR_COUNT_LABEL] = str(tpu.chips_per_host)
        if spec.tpu is not None and spec.tpu.placement_policy:
            found[PLACEMENT_POLICY_LABEL] = spec.tpu.placement_policy
    match spec.capacity:
        case Spot():
            found[SPOT_LABEL] = "true"
        case FlexStart() | Dws():
            found[FLEX_START_LABEL] = "true"
        case Reservation() as reservation:
            found[f"{RESERVATION_LABEL}-name"] = reservation.name
            found[f"{RESERVATION_LABEL}-affinity"] = "specific"
            parts = {"project": reservation.project, "blocks": reservation.block, "subblocks": reservation.sub_block}
            found |= {f"{RESERVATION_LABEL}-{part}": value for part, value in parts.items() if value}
        case _:
            pass
    return found


def tolerations(spec: JobSpec) -> list[Manifest]:
    keys = [RESOURCE] if spec.layout.target == "tpu" else []
    match spec.capacity:
        case Spot():
            keys.append(SPOT_LABEL)
        case Dws():
            keys.append(QUEUED_TAINT)
        case _:
            pass
    return [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in keys]
