"""A cluster as XPK leaves it: its queue, priorities and namespace are recognised, and both tools see each other's jobs."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any

import pytest

from launcher.backend import JobState
from launcher.backend.kubernetes import KubernetesBackend
from tests.cluster.test_queue import KUEUE
from tests.cluster.tools import PATIENCE_SECONDS, cheap_job, kubectl, nnxlaunch

FLAVOR = "1xv5litepod-16"


@pytest.fixture(scope="module")
def xpk() -> Generator[KubernetesBackend]:
    """What `xpk cluster create` makes in Kueue for v5litepod-16, and its priority classes."""
    labels = {"cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice", "cloud.google.com/gke-tpu-topology": "4x4"}
    quota = [
        {"name": "google.com/tpu", "nominalQuota": 16},
        {"name": "cpu", "nominalQuota": 480},
        {"name": "memory", "nominalQuota": "2000G"},
    ]
    group = {"coveredResources": [one["name"] for one in quota], "flavors": [{"name": FLAVOR, "resources": quota}]}
    objects: list[dict[str, Any]] = [
        {"apiVersion": KUEUE, "kind": "ResourceFlavor", "metadata": {"name": FLAVOR}, "spec": {"nodeLabels": labels}},
        {
            "apiVersion": KUEUE,
            "kind": "ClusterQueue",
            "metadata": {"name": "cluster-queue"},
            "spec": {"namespaceSelector": {}, "queueingStrategy": "BestEffortFIFO", "resourceGroups": [group]},
        },
        {
            "apiVersion": KUEUE,
            "kind": "LocalQueue",
            "metadata": {"name": "multislice-queue", "namespace": "default"},
            "spec": {"clusterQueue": "cluster-queue"},
        },
        *(
            {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name}, "value": value}
            for name, value in (("very-low", 100), ("medium", 500), ("very-high", 1000))
        ),
    ]
    everything = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    kubectl("apply", "-f", "-", stdin=everything)
    yield KubernetesBackend(namespace="default")
    kubectl("delete", "--ignore-not-found", "--wait=false", "-f", "-", stdin=everything)


def test_a_job_runs_in_the_queue_of_xpk_and_each_tool_lists_the_jobs_of_the_other(xpk: KubernetesBackend) -> None:
    found = json.loads(nnxlaunch("doctor", "-n", "default", "--output", "json").stdout)
    (line,) = (line for line in found if line["check"] == "xpk")
    assert line["level"] == "pass" and "priorities very-low, medium, very-high" in line["message"]

    job = cheap_job("beside-xpk", "print('hello')", queue="multislice-queue", priority="medium")
    xpk.create(job, replace=True)
    *_, status = xpk.watch("beside-xpk", timeout_seconds=PATIENCE_SECONDS)
    assert status.state is JobState.COMPLETED
    listed = kubectl(
        "-n", "default", "get", "workloads", "--ignore-not-found", "-o", "jsonpath={.items[*].metadata.ownerReferences[0].name}"
    )
    assert "beside-xpk" in listed.split()
    label = "jsonpath={.items[*].metadata.labels['xpk\\.google\\.com/workload']}"
    assert set(kubectl("-n", "default", "get", "pods", "-l", "xpk.google.com/workload=beside-xpk", "-o", label).split()) == {"beside-xpk"}

    theirs = job[-1]
    theirs["metadata"] = {"name": "xpk-made", "labels": {"xpk.google.com/workload": "xpk-made"}}
    theirs["spec"]["replicatedJobs"][0]["name"] = "slice-job"
    made = theirs["spec"]["replicatedJobs"][0]["template"]["spec"]
    del made["podFailurePolicy"]  # which names our container
    made["template"]["spec"]["containers"][0]["name"] = "jax-tpu"
    theirs["spec"] = {"replicatedJobs": theirs["spec"]["replicatedJobs"]}
    kubectl("-n", "default", "create", "-f", "-", stdin=json.dumps(theirs))
    assert {"beside-xpk", "xpk-made"} <= {one.name for one in xpk.list()}
    *_, status = xpk.watch("xpk-made", timeout_seconds=PATIENCE_SECONDS)
    assert status.state is JobState.COMPLETED
    logs = nnxlaunch("logs", "xpk-made", "-n", "default").stdout.splitlines()
    assert sorted(logs) == ["[s0/w0 a0] hello", "[s0/w1 a0] hello"]  # merged by time: either host may speak first
    done = nnxlaunch("delete", "xpk-made", "beside-xpk", "-n", "default")
    assert done.stdout.splitlines() == ["xpk-made: deleted", "beside-xpk: deleted"], done.stderr
