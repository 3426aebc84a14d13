"""kubectl, the command line under test, and jobs whose pods are cheap."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from launcher.backend import Manifest
from launcher.backend.kubernetes import KubernetesBackend
from launcher.manifest import render
from launcher.observe.cause import Cause
from launcher.observe.why import why
from launcher.spec import from_document
from trainer.contract import CONTAINER_NAME

CHEAP_IMAGE = "python:3.12-slim"
PATIENCE_SECONDS = 300
"""For what controllers, the kubelet and pods do, on a machine that may be busy with other things. Nothing takes that long."""


def kubectl(*words: str, stdin: str | None = None) -> str:
    done = subprocess.run(["kubectl", *words], input=stdin, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, f"kubectl {' '.join(words)}: {done.stderr}"
    return done.stdout


@contextmanager
def own_namespace() -> Iterator[str]:
    """A new one, which enforces the restricted Pod Security level."""
    name = f"nnx-{uuid.uuid4().hex[:8]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    kubectl("create", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}))
    try:
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=false")


def until_told(backend: KubernetesBackend, name: str, code: str, *, patience_seconds: float = PATIENCE_SECONDS) -> Cause:
    """The cause of that code, once a look at the job finds it: controllers need a moment."""
    deadline = time.monotonic() + patience_seconds
    while (cause := why(backend.scene(name))).code != code:
        assert time.monotonic() < deadline, cause
    return cause


def nnxlaunch(*words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """One command of the launcher, as a person runs it."""
    command = [sys.executable, "-m", "launcher", *words]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=timeout)


def document(name: str, **changes: Any) -> dict[str, Any]:
    """A small valid spec: one slice of two CPU hosts."""
    return {
        "name": name,
        "cpu": {"hosts": 2},
        "image": CHEAP_IMAGE,
        "directory": "gs://test-bucket/runs",
        "resources": {"cpu": "20m", "memory": "64Mi"},
        "grace_seconds": 15,
        "train": {
            "steps": 10,
            "model": {"preset": "tiny"},
            "batch": {"global_batch": 8, "sequence_length": 128},
            "schedule": {"type": "constant", "learning_rate": 1e-3},
            "data": {"sources": [{"type": "python_standard_library"}]},
        },
        **changes,
    }


def cheap_job(name: str, program: str, **changes: Any) -> list[Manifest]:
    """The manifests of a job as rendered, but its containers run a few lines of Python instead of the trainer."""
    manifests = render(from_document(document(name, **{"grace_seconds": 2, **changes})))
    for manifest in manifests:
        if manifest["kind"] == "JobSet":
            (container,) = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
            assert container["name"] == CONTAINER_NAME
            container["command"] = ["python", "-uc", program]
    return manifests
