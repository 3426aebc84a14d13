"""What the servers refuse in a child Job and its pods; the second half of `launcher.checks.server`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launcher.checks.names import DNS_SUBDOMAIN, LABEL_NAME, LABEL_VALUE
from launcher.labels import ACCELERATOR_LABEL, TOPOLOGY_LABEL
from launcher.manifest.names import TAS_REQUIRED_ANNOTATION, TAS_SLICE_ANNOTATION, TAS_SLICE_SIZE_ANNOTATION
from launcher.tpu.table import RESOURCE, TpuError, families, parse_topology
from trainer.config import Problem

Manifest = Mapping[str, Any]


def problem(path: str, message: str, rule: int, **more: Any) -> Problem:
    """`rule` is the number in the list of server rules; the code carries it."""
    return Problem(path=path, message=message, hint="a rule of the API server or its webhooks", code=f"server-{rule}", **more)


def labels_fit(path: str, labels: Mapping[str, str]) -> Iterator[Problem]:
    """Keys and values of labels, as every object has them."""
    for key, value in labels.items():
        prefix, _, short = key.rpartition("/")
        key_fits = LABEL_NAME.fullmatch(short) and len(short) <= 63 and (not prefix or DNS_SUBDOMAIN.fullmatch(prefix))
        if not key_fits or not LABEL_VALUE.fullmatch(value) or len(value) > 63:
            message = f"{value!r} is not a label value of at most 63 characters, or its key is wrong"
            yield problem(f"{path}.{key}", message, 24, value=value)


def job_is_accepted(path: str, job: Manifest) -> Iterator[Problem]:
    """Indexed completion and the podFailurePolicy."""
    if job.get("completionMode") == "Indexed" and "completions" not in job:
        yield problem(path, "an Indexed Job has completions", 17)
    policy = job.get("podFailurePolicy")
    if policy is None:
        return
    pod, path = job["template"]["spec"], f"{path}.podFailurePolicy"
    if pod.get("restartPolicy") != "Never" or job.get("podReplacementPolicy", "Failed") != "Failed":
        yield problem(path, "needs restartPolicy Never and podReplacementPolicy Failed", 18)
    if len(policy["rules"]) > 20:
        yield problem(f"{path}.rules", f"{len(policy['rules'])} rules", 18, limit=20)
    containers = {container["name"] for kind in ("containers", "initContainers") for container in pod.get(kind, [])}
    for index, rule in enumerate(policy["rules"]):
        where = f"{path}.rules.{index}"
        if ("onExitCodes" in rule) == ("onPodConditions" in rule):
            yield problem(where, "has exactly one of onExitCodes and onPodConditions", 18)
        codes = rule.get("onExitCodes")
        if codes is not None:
            values: list[int] = codes["values"]
            if not 1 <= len(values) <= 255 or values != sorted(set(values)) or (codes["operator"] == "In" and 0 in values):
                yield problem(f"{where}.onExitCodes.values", "1 to 255 rising, different codes, without 0", 18)
            if codes.get("containerName", next(iter(containers))) not in containers:
                yield problem(f"{where}.onExitCodes.containerName", f"no container {codes['containerName']!r}", 18)
        if len(rule.get("onPodConditions", [])) > 20:
            yield problem(f"{where}.onPodConditions", "more than 20 patterns", 18, limit=20)


def pod_is_accepted(path: str, template: Manifest) -> Iterator[Problem]:
    """Unique names, mounts that resolve, whole chips."""
    yield from labels_fit(f"{path}.metadata.labels", template.get("metadata", {}).get("labels", {}))
    pod = template["spec"]
    volumes = [volume["name"] for volume in pod.get("volumes", [])]
    containers: Sequence[Manifest] = [container for kind in ("containers", "initContainers") for container in pod.get(kind, [])]
    names = [container["name"] for container in containers]
    for what, found in (("volumes", volumes), ("containers", names)):
        if len(found) != len(set(found)):
            yield problem(f"{path}.spec.{what}", f"names occur twice: {found}", 19)
    for container in containers:
        where = f"{path}.spec.containers.{container['name']}"
        mounts: Sequence[Manifest] = container.get("volumeMounts", [])
        places = [mount["mountPath"] for mount in mounts]
        known = all(mount["name"] in volumes for mount in mounts)
        if not known or len(places) != len(set(places)) or any(":" in place for place in places):
            yield problem(f"{where}.volumeMounts", "every mount names a volume and has a path of its own, without ':'", 19)
        variables = [entry["name"] for entry in container.get("env", [])]
        if len(variables) != len(set(variables)):
            yield problem(f"{where}.env", "a variable occurs twice", 19)
        resources = container.get("resources", {})
        chips = [resources.get(kind, {}).get(RESOURCE) for kind in ("requests", "limits")]
        if any(chips) and (chips[0] != chips[1] or not isinstance(chips[0], int)):
            yield problem(f"{where}.resources", f"{RESOURCE} is a whole number, the same in requests and limits", 19)
        if pod.get("hostNetwork"):
            moved = [port for port in container.get("ports", []) if port.get("hostPort", port["containerPort"]) != port["containerPort"]]
            if moved:
                yield problem(f"{where}.ports", "under host networking hostPort is containerPort", 19)


def topology_request_is_whole(path: str, replicated: Manifest, job: Manifest) -> Iterator[Problem]:
    """Kueue's annotations for topology-aware scheduling."""
    found: Mapping[str, str] = job["template"].get("metadata", {}).get("annotations", {})
    kinds = [key for key in found if key.startswith("kueue.x-k8s.io/podset-") and key.endswith(("required-topology", "preferred-topology"))]
    whole = [key for key in kinds if key != TAS_SLICE_ANNOTATION]
    if len(whole) > 1:
        yield problem(path, f"one of {TAS_REQUIRED_ANNOTATION} and its like, not {whole}", 23)
    if (TAS_SLICE_ANNOTATION in found) != (TAS_SLICE_SIZE_ANNOTATION in found):
        yield problem(path, f"{TAS_SLICE_ANNOTATION} and {TAS_SLICE_SIZE_ANNOTATION} belong together", 23)
    elif TAS_SLICE_SIZE_ANNOTATION in found:
        size, count = found[TAS_SLICE_SIZE_ANNOTATION], replicated["replicas"] * job.get("parallelism", 1)
        if not size.isdigit() or not 1 <= int(size) <= count or count % int(size):
            yield problem(path, f"slice size {size} does not divide {count} pods", 23, value=size, limit=count)


def chips_add_up(path: str, replicated: Manifest, job: Manifest) -> Iterator[Problem]:
    """product(topology) = hosts x chips of a pod, for a shape in the table; several slices only of several hosts."""
    pod = job["template"]["spec"]
    selector: Mapping[str, str] = pod.get("nodeSelector", {})
    accelerator, topology = selector.get(ACCELERATOR_LABEL), selector.get(TOPOLOGY_LABEL)
    if accelerator is None or topology is None:
        return
    family = next((family for family in families().values() if family.gke_accelerator == accelerator), None)
    try:
        shape = parse_topology(topology)
    except TpuError:
        shape = ()
    if family is None or not family.has(shape):
        yield problem(f"{path}.nodeSelector", f"there is no {accelerator} {topology}", 25, value=topology)
        return
    chips = math.prod(shape)
    of_pod = sum(container.get("resources", {}).get("limits", {}).get(RESOURCE, 0) for container in pod["containers"])
    parallelism = job.get("parallelism", 1)
    if parallelism * of_pod != chips:
        yield problem(path, f"{topology} has {chips} chips, but {parallelism} pods x {of_pod} chips are asked for", 25, limit=chips)
    if replicated["replicas"] > 1 and parallelism == 1 and not job.get("backoffLimit"):  # Jobs that restart by themselves are not joined
        yield problem(path, "several slices of one host each cannot be joined", 25)
