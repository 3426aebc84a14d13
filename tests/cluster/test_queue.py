"""A job in a Kueue queue says why it waits, and runs once there is room."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any

import pytest

from launcher.backend import JobState, JobStatus
from launcher.backend.kubernetes import KubernetesBackend
from tests.cluster.tools import PATIENCE_SECONDS, cheap_job, kubectl

KUEUE = "kueue.x-k8s.io/v1beta2"


def quota(cpu: str) -> dict[str, Any]:
    resources = [{"name": "cpu", "nominalQuota": cpu}, {"name": "memory", "nominalQuota": "1Gi"}]
    groups = [{"coveredResources": ["cpu", "memory"], "flavors": [{"name": "nnx-test", "resources": resources}]}]
    return {"namespaceSelector": {}, "resourceGroups": groups}


@pytest.fixture
def queue(namespace: str) -> Generator[str]:
    """A local queue with next to no CPU."""
    objects: list[dict[str, Any]] = [
        {"kind": "ResourceFlavor", "metadata": {"name": "nnx-test"}},
        {"kind": "ClusterQueue", "metadata": {"name": "nnx-test"}, "spec": quota("1m")},
        {"kind": "LocalQueue", "metadata": {"name": "small", "namespace": namespace}, "spec": {"clusterQueue": "nnx-test"}},
    ]
    everything = json.dumps({"apiVersion": "v1", "kind": "List", "items": [{"apiVersion": KUEUE, **thing} for thing in objects]})
    kubectl("apply", "-f", "-", stdin=everything)
    yield "small"
    kubectl("delete", "--ignore-not-found", "--wait=false", "-f", "-", stdin=everything)


def test_a_queued_job_waits_with_a_reason_and_runs_when_there_is_room(backend: KubernetesBackend, queue: str) -> None:
    backend.create(cheap_job("queued", "print('in')", queue=queue))
    seen: list[JobStatus] = []
    raised = False
    for status in backend.watch("queued", timeout_seconds=PATIENCE_SECONDS):
        seen.append(status)
        if "insufficient" in status.message and not raised:
            kubectl("patch", "clusterqueue", "nnx-test", "--type=merge", "-p", json.dumps({"spec": quota("1")}))
            raised = True
    states = [status.state for status in seen]
    assert states[0] is JobState.QUEUED
    assert states[-1] is JobState.COMPLETED
    assert raised and any(status.message.startswith("waiting in queue small: ") for status in seen), seen
    backend.delete("queued")
