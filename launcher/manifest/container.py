"""The trainer container: command, environment, resources, mounts, security."""

from __future__ import annotations

from typing import Any, Final

from launcher.manifest import names
from launcher.manifest.volumes import mounts
from launcher.spec import JobSpec
from launcher.spec.pod import FromSecret, Image
from launcher.tpu.table import RESOURCE
from trainer import contract
from trainer.config.diloco import worlds_apart

Manifest = dict[str, Any]

TPU_PORTS: Final = {"tpu-builder": 8471, "megascale": 8080, "tpu-metrics": 8431}
"""Ports the TPU runtime listens on; named here so that firewalls and people can see them."""

_PULL_POLICIES: Final = {"always": "Always", "if_not_present": "IfNotPresent", "never": "Never"}

_RUN_AS: Final = 10001
"""The image's user and group."""


def container(spec: JobSpec) -> Manifest:
    """No probes: a compile or a restore may be silent for long, and every process dies with its peers anyway."""
    image = spec.container_image
    return {
        "name": contract.CONTAINER_NAME,
        "image": image.reference,
        "imagePullPolicy": pull_policy(image),
        "command": command(),
        "env": environment(spec),
        "ports": [{"name": name, "containerPort": port} for name, port in ports(spec).items()],
        "resources": resources(spec),
        "securityContext": security_context(spec),
        "terminationMessagePath": contract.TERMINATION_LOG_PATH,
        "terminationMessagePolicy": "File",
        "volumeMounts": mounts(spec),
    }


def command() -> list[str]:
    """Exec form: the trainer's parent is PID 1 and gets SIGTERM itself."""
    return ["python", "-m", "trainer", "--config", f"{contract.CONFIG_DIRECTORY}/{contract.CONFIG_FILE}"]


def pull_policy(image: Image) -> str:
    """A tag of a registry can move, so every restart asks again; a digest, or a name without a registry, cannot."""
    if image.pull_policy is not None:
        return _PULL_POLICIES[image.pull_policy]
    local = "/" not in image.reference
    return "IfNotPresent" if local or "@" in image.reference else "Always"


def environment(spec: JobSpec) -> list[Manifest]:
    """The contract's variables, then the spec's own, which a rule of launcher.checks keeps apart."""
    layout = spec.layout
    ours: list[Manifest] = [
        {"name": contract.RUN_NAME, "value": spec.name},
        {"name": contract.SPEC_HASH, "value": spec.hash},
        _from_field(contract.POD_NAME, "metadata.name"),
        _from_field(contract.POD_IP, "status.podIP"),
        _from_field(contract.NODE_NAME, "spec.nodeName"),
        _from_field(contract.JOB_INDEX, f"metadata.labels['{names.JOB_INDEX_LABEL}']"),
        _from_field(contract.ATTEMPT, f"metadata.labels['{names.RESTART_ATTEMPT_LABEL}']"),
        {"name": contract.NUM_SLICES, "value": str(layout.slices)},
        {"name": contract.HOSTS_PER_SLICE, "value": str(layout.hosts_per_slice)},
        {"name": contract.GRACE_SECONDS, "value": str(spec.grace)},
    ]
    if worlds_apart(spec.train):
        ours.append(_from_field(contract.JOB_UID, f"metadata.labels['{names.JOB_UID_LABEL}']"))
    if layout.tpu is not None:
        # GKE sets TPU_* and MEGASCALE_* itself; a value rendered here would be stale after a restart.
        ours += [
            {"name": contract.JAX_COORDINATOR_PORT, "value": str(spec.network.coordinator_port)},
            {"name": contract.PEAK_TFLOPS_PER_DEVICE, "value": f"{layout.tpu.peak_bf16_tflops_per_device:g}"},
        ]
    else:
        ours += [
            {"name": contract.COORDINATOR, "value": names.coordinator(spec)},
            {"name": contract.DEVICES_PER_HOST, "value": str(layout.devices_per_host)},
            {"name": "JAX_PLATFORMS", "value": "cpu"},
        ]
    return ours + [_given(name, value) for name, value in sorted(spec.env.items())]


def _from_field(name: str, path: str) -> Manifest:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _given(name: str, value: str | FromSecret) -> Manifest:
    if isinstance(value, str):
        return {"name": name, "value": value}
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": value.secretKeyRef.name, "key": value.secretKeyRef.key}}}


def ports(spec: JobSpec) -> dict[str, int]:
    return {"coordinator": spec.network.coordinator_port, **(TPU_PORTS if spec.layout.target == "tpu" else {})}


def resources(spec: JobSpec) -> Manifest:
    """CPU is only requested; memory and chips are the same in requests and limits."""
    hard: Manifest = {} if spec.resources.memory is None else {"memory": spec.resources.memory}
    if spec.layout.tpu is not None:
        hard[RESOURCE] = spec.layout.tpu.chips_per_host
    soft: Manifest = {} if spec.resources.cpu is None else {"cpu": spec.resources.cpu}
    return {key: value for key, value in {"requests": {**soft, **hard}, "limits": hard}.items() if value}


def security_context(spec: JobSpec) -> Manifest:
    """Of the container. `restricted` passes the Pod Security level of that name, `root_no_caps` passes `baseline`."""
    if spec.security == "privileged":
        return {"privileged": True}
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True}


def pod_security_context(spec: JobSpec) -> Manifest:
    if spec.security == "privileged":
        return {"runAsUser": 0}
    seccomp = {"seccompProfile": {"type": "RuntimeDefault"}}
    if spec.security == "root_no_caps":
        return {"runAsUser": 0, **seccomp}
    user = {"runAsNonRoot": True, "runAsUser": _RUN_AS, "runAsGroup": _RUN_AS}
    return {**user, "fsGroup": _RUN_AS, "fsGroupChangePolicy": "OnRootMismatch", **seccomp}
