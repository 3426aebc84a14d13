"""One pod that is a job's pod in everything but its program: its image, account, security, variables and volumes."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any, Final

from launcher.backend.kubernetes import KubernetesBackend
from launcher.backend.status import JobState, JobStatus, Manifest
from launcher.doctor.finding import Finding, Level, bad, good
from launcher.errors import NnxlaunchError
from launcher.manifest import render
from launcher.spec import JobSpec, from_document

LOOK_SECONDS: Final = 1.0
"""The pod is looked at this often; a waiting pod changes nothing of its JobSet, which alone is watched."""
NEVER_STARTS: Final = (
    "ImagePull",
    "ErrImage",
    "InvalidImageName",
    "CreateContainer",
    "pull image",
    "back-off",
    "not found",
    "couldn't find",
)
"""What a pod says that waits for something no time will bring."""


def probe_manifests(spec: JobSpec, *, tpu: bool) -> list[Manifest]:
    """Of one slice with one host; without TPUs and outside of any queue unless `tpu`."""
    document: dict[str, Any] = spec.model_dump(mode="json")
    document |= {
        "name": f"doctor-{uuid.uuid4().hex[:6]}",
        "image": spec.container_image.model_dump(mode="json"),
        "failure": {"mode": "simple", "max_restarts": 0},
        "placement": {"type": "none"},
        "ttl_seconds": 600,
        "grace_seconds": 15,
    }
    if not tpu:
        document |= {"tpu": None, "cpu": {"hosts": 1}, "capacity": {"type": "on_demand"}, "queue": None}
    manifests = render(from_document(document))
    for manifest in manifests:
        if manifest["kind"] == "JobSet":
            (part,) = manifest["spec"]["replicatedJobs"]
            part["replicas"] = 1
            part["template"]["spec"] |= {"parallelism": 1, "completions": 1}
            (container,) = part["template"]["spec"]["template"]["spec"]["containers"]
            container["command"] = ["python", "-m", "trainer.probe", spec.directory, *(["--tpu"] if tpu else [])]
    return manifests


def probe(backend: KubernetesBackend, spec: JobSpec, *, tpu: bool, timeout_seconds: float) -> Iterator[Finding]:
    """Start the pod, read its findings, remove it. Waits at most so long for the pod to end."""
    manifests = probe_manifests(spec, tpu=tpu)
    name: str = manifests[-1]["metadata"]["name"]
    image = spec.container_image.reference
    try:
        backend.create(manifests)
    except NnxlaunchError as error:
        yield bad("pod", str(error), error.hint)
        return
    try:
        status, words = _settled(backend, name, timeout_seconds)
        lines = [line.text for line in backend.logs(name)] if any(pod.started_at for pod in status.pods) else []
        found = list(_findings(lines))
        if found:
            yield good("image", f"{image} starts as a pod of this job")
            yield from found
        elif status.state is JobState.FAILED:
            yield bad(
                "pod",
                f"the image {image} has no working `python -m trainer.probe`: {lines[-1] if lines else words}",
                "nnxlaunch image build",
            )
        else:
            fix = f"compare `volumes`, `env`, `resources` and `service_account` with: kubectl -n {backend.namespace} get secrets,pvc,sa"
            if "pull" in words:
                fix = f"compare `image` and `image.pull_secrets` with the registry and: kubectl -n {backend.namespace} get secrets"
            yield bad("pod", f"a pod of this job does not start: {words or status.state}", fix)
    finally:
        backend.delete(name)


def _settled(backend: KubernetesBackend, name: str, timeout_seconds: float) -> tuple[JobStatus, str]:
    """The job once it has ended or will never start, or when the time is over; and what its pods say."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        status = backend.get(name)
        words = "; ".join(pod.message for pod in status.pods if pod.message) or status.message
        left = deadline - time.monotonic()
        if status.state.finished or left <= 0 or any(part.lower() in words.lower() for part in NEVER_STARTS):
            return status, words
        for _ in backend.watch(name, timeout_seconds=min(LOOK_SECONDS, left)):
            pass


def _findings(lines: list[str]) -> Iterator[Finding]:
    for line in lines:
        if line.startswith('{"check"'):
            data: dict[str, str] = json.loads(line)
            yield Finding(check=data["check"], level=Level(data["level"]), message=data["message"], fix=data["fix"])
