"""Suspend, resume, restart, delete: on real pods, with and without a queue."""

from __future__ import annotations

import json
from collections.abc import Generator

import pytest

from launcher.backend import JobState
from launcher.backend.kubernetes import KubernetesBackend
from launcher.errors import NnxlaunchError
from tests.cluster.test_queue import KUEUE, quota
from tests.cluster.tools import PATIENCE_SECONDS, cheap_job, kubectl, nnxlaunch

# As the trainer does: SIGTERM leads to exit 75. `done` in the run's log ends the second life.
SAVES = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print("began", flush=True)
signal.sigwait([signal.SIGTERM])
sys.exit(75)
"""


@pytest.fixture(scope="module")
def queue(namespace: str) -> Generator[str]:
    spec = json.loads(json.dumps(quota("1")).replace("nnx-test", "nnx-control"))
    objects = [
        {"kind": "ResourceFlavor", "metadata": {"name": "nnx-control"}},
        {"kind": "ClusterQueue", "metadata": {"name": "nnx-control"}, "spec": spec},
        {"kind": "LocalQueue", "metadata": {"name": "control", "namespace": namespace}, "spec": {"clusterQueue": "nnx-control"}},
    ]
    everything = json.dumps({"apiVersion": "v1", "kind": "List", "items": [{"apiVersion": KUEUE, **thing} for thing in objects]})
    kubectl("apply", "-f", "-", stdin=everything)
    yield "control"
    kubectl("delete", "--ignore-not-found", "--wait=false", "-f", "-", stdin=everything)


def until(backend: KubernetesBackend, name: str, state: JobState) -> None:
    for status in backend.watch(name, timeout_seconds=PATIENCE_SECONDS):
        if status.state is state:
            return
    raise AssertionError(f"{name} is never {state}")


def test_a_suspended_job_has_no_pods_gives_its_quota_back_and_goes_on_when_resumed(
    backend: KubernetesBackend, namespace: str, queue: str
) -> None:
    backend.create(cheap_job("held", SAVES, queue=queue, failure={"max_restarts": 0}))
    until(backend, "held", JobState.RUNNING)
    assert nnxlaunch("suspend", "held", "-n", namespace).returncode == 0
    held = backend.get("held")
    assert (held.state, [pod for pod in held.pods if pod.phase == "Running"]) == (JobState.QUEUED, [])
    kubectl("wait", "clusterqueue/nnx-control", "--for=jsonpath={.status.reservingWorkloads}=0", "--timeout=240s")  # told a moment later
    usage = kubectl(
        "get", "clusterqueue", "nnx-control", "-o", "jsonpath={.status.flavorsReservation[0].resources[?(@.name=='cpu')].total}"
    )
    assert usage == "0"
    assert nnxlaunch("resume", "held", "-n", namespace).returncode == 0
    until(backend, "held", JobState.RUNNING)
    assert (backend.get("held").restarts_used, backend.get("held").restarts_max) == (0, 0)
    backend.delete("held")


def test_a_restarted_job_has_new_pods_and_no_counted_restart(backend: KubernetesBackend, namespace: str) -> None:
    backend.create(cheap_job("again", SAVES, failure={"max_restarts": 0}))
    until(backend, "again", JobState.RUNNING)
    assert nnxlaunch("resume", "again", "-n", namespace).returncode == 1
    first = {pod.name for pod in backend.get("again").pods}
    assert nnxlaunch("restart", "again", "-n", namespace).returncode == 0
    until(backend, "again", JobState.RUNNING)
    status = backend.get("again")
    assert first.isdisjoint(pod.name for pod in status.pods)
    assert (status.restarts_used, status.restarts_max) == (0, 0), "what a person asks for is never counted"
    backend.delete("again")


def test_what_has_ended_is_not_restarted_and_the_way_on_is_named(backend: KubernetesBackend) -> None:
    backend.create(cheap_job("ended", "raise SystemExit(64)"))
    until(backend, "ended", JobState.FAILED)
    for verb in (backend.suspend, backend.resume):
        with pytest.raises(NnxlaunchError, match="has ended") as caught:
            verb("ended")
        assert "submit SPEC --replace" in caught.value.hint


def test_delete_takes_several_names_and_names_that_no_spec_may_have(backend: KubernetesBackend, namespace: str) -> None:
    old = "a" * 40  # no pod of it could have a name, were it several slices; made by an older tool
    for name in (old, "second"):
        jobset = cheap_job("template", "pass")[-1]
        jobset["metadata"] = {"name": name}
        jobset["spec"] |= {"suspend": True, "network": {"subdomain": "n"}}
        kubectl("-n", namespace, "create", "-f", "-", stdin=json.dumps(jobset))
    done = nnxlaunch("delete", old, "Not_A_Name", "../second", "second", "-n", namespace)
    assert done.stdout.splitlines() == [f"{old}: deleted", "second: deleted"]
    assert done.returncode == 66
    assert [line for line in done.stderr.splitlines() if line.startswith("error")] == [
        f"error: no job {name!r} in namespace {namespace!r} of cluster 'test-cluster' (context 'test-cluster')"
        for name in ("Not_A_Name", "../second")
    ]
