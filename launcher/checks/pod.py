"""Security, termination, network, environment, mounts, image."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Final

from launcher.labels import SPOT_GRACE_SECONDS
from launcher.manifest.container import TPU_PORTS
from launcher.manifest.volumes import OWN_MOUNTS
from launcher.redact import SECRET_NAME, has_secret_form, looks_random
from launcher.spec import JobSpec, Layout
from launcher.spec.capacity import Spot
from launcher.spec.job import MAX_GRACE_SECONDS
from launcher.spec.pod import FromSecret
from trainer import contract
from trainer.config import Problem

MIN_GRACE_SECONDS: Final = contract.SURVIVOR_WAIT_SECONDS + 5
"""A process that lost a peer waits this long for the cause before it exits."""

JOBSET_FIELDS: Final = {
    (0, 7): "failurePolicy.restartStrategy BlockingRecreate",
    (0, 10): "failurePolicy.rules.onJobFailureMessagePatterns (failure.mode smart)",
}
"""First JobSet release of the newest fields the launcher renders."""

_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_RESERVED: Final = ("NNX_", "TPU_", "MEGASCALE_", "JOB_COMPLETION_INDEX", "JAX_COORDINATOR_", "JAX_PROCESS_ID", "JAX_NUM_PROCESSES")
_FIXED: Final = {
    "JAX_PLATFORMS": ("follows from `tpu` or `cpu`; another platform would not have the devices of the mesh", "leave it out"),
    "JAX_NUM_CPU_DEVICES": ("follows from `cpu.devices_per_host`", "set `cpu.devices_per_host`"),
    "PYTHONPATH": ("is where the image keeps the trainer, which would not be found elsewhere", "install packages into the image"),
    "PATH": ("is where the image keeps its Python, which the command is run with", "install programs into the image"),
    "HOME": ("is /tmp, the one folder one may write to below a read-only root", "set the variable of the program, such as HF_HOME"),
}
"""Variables on which the pod's command depends, with the reason and a way out."""

_HOST = r"[a-zA-Z0-9]([-a-zA-Z0-9]*[a-zA-Z0-9])?"
_PORT = r":[0-9]{1,5}"
_DOMAIN = rf"(localhost({_PORT})?|{_HOST}(\.{_HOST})+({_PORT})?|{_HOST}{_PORT})"  # else the first part is a folder of Docker Hub
_PATH = r"[a-z0-9]+([._]+[a-z0-9]+|-+[a-z0-9]+)*"
_TAG = r"(:[A-Za-z0-9_][-A-Za-z0-9_.]{0,127})?(@sha256:[0-9a-f]{64})?"
_REFERENCE: Final = re.compile(rf"({_DOMAIN}/)?{_PATH}(/{_PATH})*{_TAG}", re.ASCII)


def host_network_needs_privileges(spec: JobSpec) -> Iterator[Problem]:
    """The Pod Security levels `restricted` and `baseline` refuse it, and JobSet then shows no reason."""
    if spec.network.host_network and spec.security != "privileged":
        message = f"host networking is refused in the namespaces that `security: {spec.security}` is for"
        hint = "set `security: privileged` and use a privileged namespace, or leave host networking off"
        yield Problem(path="network.host_network", message=message, hint=hint, code="host-network", value=True, limit=False)


def host_network_ports(spec: JobSpec, layout: Layout) -> Iterator[Problem]:
    """Pods of one node share its ports under host networking, and only TPU pods have a node to themselves."""
    if spec.network.host_network and layout.target == "cpu" and layout.hosts > 1:
        message = f"{layout.hosts} pods may share a node, and then port {spec.network.coordinator_port}"
        yield Problem(path="network.host_network", message=message, hint="leave it off without TPUs", code="host-network-ports", value=True)


def coordinator_port_is_free(spec: JobSpec, layout: Layout) -> Iterator[Problem]:
    port = spec.network.coordinator_port
    taken = {number: name for name, number in TPU_PORTS.items()} if layout.target == "tpu" else {}
    if port in taken:
        message = f"port {port} belongs to the TPU runtime ({taken[port]})"
        yield Problem(path="network.coordinator_port", message=message, hint=f"use {contract.COORDINATOR_PORT}", code="port", value=port)


def grace_fits_capacity(spec: JobSpec) -> Iterator[Problem]:
    grace = spec.grace
    if isinstance(spec.capacity, Spot) and grace > SPOT_GRACE_SECONDS:
        yield Problem(
            path="grace_seconds",
            message=f"{grace} s, but a spot node goes {SPOT_GRACE_SECONDS} s after its notice",
            hint="leave it out, and save often: checkpoint.every_steps is what protects a run on spot capacity",
            code="grace-spot",
            value=grace,
            limit=SPOT_GRACE_SECONDS,
        )
    if grace < MIN_GRACE_SECONDS:
        wait = contract.SURVIVOR_WAIT_SECONDS
        message = f"{grace} s are too few: a process that lost a peer waits {wait} s for the cause, then leaves"
        hint = f"at least {MIN_GRACE_SECONDS}"
        yield Problem(path="grace_seconds", message=message, hint=hint, code="grace-short", value=grace, limit=MIN_GRACE_SECONDS)


def grace_fits_save(spec: JobSpec, *, step: int, seconds: float) -> Iterator[Problem]:
    """Of a run whose last save, of `step`, took so long. Where the capacity gives no more, only a grace of one's own is refused: what it
    gives by itself is all there is, and `save_outlasts_capacity` says so."""
    needed, most = contract.grace_needed(seconds), _longest_grace(spec)
    if spec.grace >= needed or (needed > most and spec.grace_seconds is None):
        return
    leave_out = f"leave it out: hosts of this capacity get {most} s at most, so that checkpoint.every_steps is what protects the run"
    yield Problem(
        path="grace_seconds",
        message=f"{spec.grace} s, but the save of step {step} took {seconds:.1f} s; after the {contract.SURVIVOR_WAIT_SECONDS} s that a "
        f"process waits for the cause when it lost a peer, a host needs {needed} s to leave with its work",
        hint=f"grace_seconds: {needed}" if needed <= most else leave_out,
        code="grace-save",
        value=spec.grace,
        limit=needed,
    )


def save_outlasts_capacity(spec: JobSpec, *, step: int, seconds: float) -> str:
    """What is lost where no grace that the capacity gives is long enough for a save; else nothing."""
    needed, most = contract.grace_needed(seconds), _longest_grace(spec)
    if spec.grace >= needed or needed <= most or spec.grace_seconds is not None:
        return ""
    return (
        f"the save of step {step} took {seconds:.1f} s, and hosts of this capacity get {most} s at most to leave: "
        f"one that is taken loses what it did since its last checkpoint (checkpoint.every_steps: {spec.train.checkpoint.every_steps})"
    )


def _longest_grace(spec: JobSpec) -> int:
    return SPOT_GRACE_SECONDS if isinstance(spec.capacity, Spot) else MAX_GRACE_SECONDS


def jobset_knows_the_fields(spec: JobSpec) -> Iterator[Problem]:
    """Every rendered field is in the CRD of the oldest release the spec promises to run on."""
    major, minor = (int(part) for part in spec.jobset_version.split("."))
    for release, what in JOBSET_FIELDS.items():
        needed = release == (0, 7) or spec.failure.mode == "smart"
        if needed and (major, minor) < release:
            hint = "take `failure: {mode: strict}`" if release == (0, 10) else "upgrade JobSet"
            message = f"{spec.jobset_version}: {what} needs JobSet {'.'.join(map(str, release))}"
            yield Problem(path="jobset_version", message=message, hint=hint, code="jobset-version", value=spec.jobset_version)


def environment_is_valid(spec: JobSpec) -> Iterator[Problem]:
    """Names a shell could use; none that the launcher, its image, Kubernetes or the TPU runtime sets."""
    for name in spec.env:
        if not _ENV_NAME.fullmatch(name):
            message = f"{name[:80]!r} is not the name of a variable: letters, digits, '_'"
            yield Problem(path=f"env.{name}", message=message, hint="such as MY_SETTING", code="env-name", value=name)
        elif name in _FIXED:
            reason, hint = _FIXED[name]
            yield Problem(path=f"env.{name}", message=f"{name} {reason}", hint=hint, code="env-reserved", value=name)
        elif name.startswith(_RESERVED):
            message = f"{name} is set by the launcher or the TPU runtime; a fixed value would be wrong after a restart"
            yield Problem(path=f"env.{name}", message=message, hint="leave it out", code="env-reserved", value=name)


def environment_has_no_secrets(spec: JobSpec) -> Iterator[Problem]:
    """By the variable's name, the value's form, or its randomness. The value is never repeated."""
    for name, value in spec.env.items():
        hint = f"create a Secret and write `{name}: {{secretKeyRef: {{name: ..., key: ...}}}}`"
        if name == "GOOGLE_APPLICATION_CREDENTIALS":
            message = "key files do not belong into a job"
            yield Problem(path=f"env.{name}", message=message, hint="bind the service account (Workload Identity)", code="key-file")
        elif isinstance(value, FromSecret):
            if not re.fullmatch(r"[-._A-Za-z0-9]{1,253}", value.secretKeyRef.key, re.ASCII):
                message = "is not a key of a Secret: letters, digits, '-', '_', '.'"
                yield Problem(path=f"env.{name}.secretKeyRef.key", message=message, hint="check the spelling", code="secret-key")
        elif value and (SECRET_NAME.search(name) or has_secret_form(value) or looks_random(name, value)):
            yield Problem(path=f"env.{name}", message="looks like a secret; a spec is stored and shown in clear", hint=hint, code="secret")


def text_has_no_secrets(spec: JobSpec) -> Iterator[Problem]:
    """Labels and annotations are shown to everyone who may read the job."""
    for group, entries in (("labels", spec.labels), ("annotations", spec.annotations)):
        for key, value in entries.items():
            if has_secret_form(value):
                yield Problem(path=f"{group}.{key}", message="looks like a secret", hint="take it out", code="secret")


def mounts_are_apart(spec: JobSpec) -> Iterator[Problem]:
    """Absolute paths, each mounted once, none of the launcher's own."""
    seen = {path: f"the launcher's {name}" for name, path in OWN_MOUNTS.items()}
    for index, volume in enumerate(spec.volumes):
        path, where = volume.mount_path, f"volumes.{index}.mount_path"
        parts = PurePosixPath(path).parts
        if not path.startswith("/") or ".." in parts or len(parts) < 2 or ":" in path or not path.isprintable():
            message = f"{path[:80]!r} is not an absolute path below / without '..' and ':'"
            yield Problem(path=where, message=message, hint="such as /data", code="mount-path", value=path)
            continue
        clean = str(PurePosixPath(path))
        if clean in seen:
            message = f"{path!r} is already the mount of {seen[clean]}"
            yield Problem(path=where, message=message, hint="choose another path", code="mount-twice", value=path)
        seen[clean] = f"volumes.{index}"


def image_is_a_reference(spec: JobSpec) -> Iterator[Problem]:
    if spec.image is None:
        return
    reference = spec.image.reference
    if not _REFERENCE.fullmatch(reference):
        message = f"{reference[:120]!r} is not an image: [registry/]path[:tag][@sha256:digest], lower case"
        yield Problem(path="image.reference", message=message, hint="such as registry/project/trainer:1.2", code="image", value=reference)
    elif spec.image.digest_policy == "require_digest" and "/" not in reference and "@" not in reference:
        message = f"{reference!r} is an image of this machine and has no digest, which `digest_policy: require_digest` asks for"
        hint = "name the image of a registry, or leave `digest_policy` out"
        yield Problem(path="image.digest_policy", message=message, hint=hint, code="image-digest", value="require_digest")
