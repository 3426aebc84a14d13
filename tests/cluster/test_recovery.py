"""One run of the real trainer through all that can happen to it: it goes on from its last committed checkpoint, by itself."""

from __future__ import annotations

import json
import os
import re
import signal
import uuid
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from launcher.backend import Manifest
from launcher.backend.kubernetes import KubernetesBackend
from launcher.backend.status import JOBSET_NAME_LABEL
from launcher.manifest import render
from launcher.spec import from_document
from tests.cluster.long_run import Run
from tests.cluster.node import first_process, kubelet_away, node_name
from tests.cluster.test_end_to_end import TRAIN
from tests.cluster.test_queue import KUEUE
from tests.cluster.tools import PATIENCE_SECONDS, cheap_job, document, kubectl
from tests.gcs_emulator import Gcs

NAME = "long"
LIMITS = {"cpu": "50m", "memory": "1536Mi"}
SCRATCH_MIB = 64  # of /tmp, in this test
# What was executed has ended before the container does: else whoever asked might not hear how it ended.
KILL_CHILD = """
import os, signal, time
for entry in filter(str.isdigit, os.listdir("/proc")):
    with open(f"/proc/{entry}/cmdline", "rb") as file:
        if b"trainer.worker" in file.read():
            break
else:
    raise SystemExit("no trainer")
if os.fork() == 0:
    os.setsid()
    for stream in range(3):
        os.close(stream)
    while os.getppid() != 1:
        time.sleep(0.01)
    os.kill(int(entry), signal.SIGKILL)
"""
# The kernel takes the process with the highest score: of the adjustment and its size, so these are many and small.
USE_UP_MEMORY = """
import os, signal
for entry in filter(str.isdigit, os.listdir("/proc")):
    with open(f"/proc/{entry}/cmdline", "rb") as file:
        if b"trainer.worker" in file.read():
            break
with open(f"/proc/{entry}/oom_score_adj", "w") as file:
    file.write("1000")
for _ in range(16):
    if os.fork() == 0:
        held = bytearray(os.urandom(1 << 20)) * 128
        signal.pause()
os.wait()
"""
PROCESSES = """
import os
for entry in sorted(filter(str.isdigit, os.listdir("/proc")), key=int):
    with open(f"/proc/{entry}/cmdline") as file:
        print(entry, *file.read().split(chr(0))[:4])
"""
FILL_SCRATCH = f"open('/tmp/big', 'wb').write(bytes({2 * SCRATCH_MIB} << 20))"


@pytest.fixture
def queue(namespace: str) -> Generator[str]:
    """Room for one job, which a job of higher priority takes."""
    resources = [{"name": "cpu", "nominalQuota": "100m"}, {"name": "memory", "nominalQuota": "8Gi"}]
    groups = [{"coveredResources": ["cpu", "memory"], "flavors": [{"name": namespace, "resources": resources}]}]
    spec = {"namespaceSelector": {}, "resourceGroups": groups, "preemption": {"withinClusterQueue": "LowerPriority"}}
    objects: list[Manifest] = [
        {"kind": "ResourceFlavor", "metadata": {"name": namespace}},
        {"kind": "ClusterQueue", "metadata": {"name": namespace}, "spec": spec},
        {"kind": "LocalQueue", "metadata": {"name": "recovery", "namespace": namespace}, "spec": {"clusterQueue": namespace}},
        {"kind": "WorkloadPriorityClass", "metadata": {"name": namespace}, "value": 1000},
    ]
    everything = json.dumps({"apiVersion": "v1", "kind": "List", "items": [{"apiVersion": KUEUE, **thing} for thing in objects]})
    kubectl("apply", "-f", "-", stdin=everything)
    yield "recovery"
    kubectl("delete", "--ignore-not-found", "--wait=false", "-f", "-", stdin=everything)


COUNTED, FREE, NONE = (1, 0), (0, 1), (0, 0)
"""Restarts used and free."""


@dataclass(frozen=True)
class Happening:
    """What must have come of it."""

    words: str
    """Of `status`, about what ended the attempt."""
    restarts: tuple[tuple[int, int], ...]
    """One of these."""
    ends_the_attempt: bool = True


def happenings(run: Run, namespace: str, queue: str) -> Iterator[Happening]:
    """Each makes one thing happen."""
    run.execute(0, KILL_CHILD)  # the coordinator's process
    yield Happening("slice 0, worker 0 exited with 137: killed with SIGKILL", (COUNTED,))
    run.execute(1, USE_UP_MEMORY)
    yield Happening("slice 0, worker 1 exited with 137: killed: out of memory", (COUNTED,))
    run.execute(1, FILL_SCRATCH)
    # The kubelet sets no DisruptionTarget for a pod's own fault; a host that saves and leaves (75) before may be what its Job saw first.
    yield Happening("slice 0, worker 1 was evicted: .*EmptyDir", (COUNTED, FREE))
    with kubelet_away():
        pass
    yield Happening("slice 0, worker 1 was evicted: .*EmptyDir", (NONE,), ends_the_attempt=False)
    with kubelet_away():
        os.kill(first_process(run.pod(1)), signal.SIGKILL)
    yield Happening("slice 0, worker 1", (COUNTED,))
    node = node_name()
    chosen = f"--pod-selector={JOBSET_NAME_LABEL}={NAME}"
    kubectl("drain", node, chosen, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=240s")
    kubectl("uncordon", node)
    yield Happening(r"slice 0, worker \d exited with 75", (FREE,))  # both leave together, and either may be first
    with kubelet_away():
        kubectl("delete", "node", node)
        free = run.told().status.restarts_free
        assert any(status.restarts_free > free for status in run.backend.watch(NAME, timeout_seconds=PATIENCE_SECONDS))
    yield Happening(r"slice 0, worker \d was taken away .*deleted node", (FREE,))
    run.backend.create(cheap_job("urgent", "print('done')", queue={"name": queue, "priority": namespace}, resources=LIMITS))
    # Nothing has failed, unless the place is free again while the old pods still leave with 75. The events of Kueue tell.
    yield Happening("", (NONE, FREE))


def failure_of_the_job(namespace: str) -> str:
    """The last one, in the words of the Job controller: which pod, and its exit code or condition, or none where no rule knows it."""
    chosen = f"involvedObject.kind=Job,involvedObject.name={NAME}-slice-0"
    events = json.loads(kubectl("-n", namespace, "get", "events", "--field-selector", chosen, "-o", "json"))["items"]
    failures = [event for event in events if event["reason"] in ("PodFailurePolicy", "BackoffLimitExceeded")]
    return max(failures, key=lambda event: event["lastTimestamp"])["message"]


def test_the_run_goes_on_from_its_last_checkpoint_whatever_happens_to_it(
    backend: KubernetesBackend, namespace: str, image: str, storage: Gcs, queue: str
) -> None:
    train: dict[str, Any] = {
        **TRAIN,
        "steps": 1_000_000,
        "mesh": {"ici": {"fsdp": 2}},
        "checkpoint": {"every_steps": 50},
        "metrics": {"log_every_steps": 10},
    }
    spec = document(
        NAME, cpu={"hosts": 2, "devices_per_host": 1}, image={"reference": image, "pull_policy": "never"},
        directory=f"{storage.url}/{uuid.uuid4().hex[:8]}", queue=queue, env=storage.environment, train=train, grace_seconds=60,
        resources=LIMITS, failure={"max_restarts": 4},
    )  # fmt: skip
    manifests = render(from_document(spec))
    pod = manifests[-1]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    next(volume for volume in pod["volumes"] if volume["name"] == "tmp")["emptyDir"] = {"sizeLimit": f"{SCRATCH_MIB}Mi"}
    backend.create(manifests)
    run = Run(backend, NAME)
    run.commits()
    first, *others = run.execute(0, PROCESSES).splitlines()
    assert first == "1 python -m trainer --config", "no shell between the kubelet's signal and the trainer's parent"
    assert [line.split()[3] for line in others[:2]] == ["trainer.worker", "trainer.parent.uploader"]
    used = free = 0
    for happening in happenings(run, namespace, queue):
        if happening.ends_the_attempt:
            run.goes_on()
        else:
            run.commits()
        told = run.told()
        taken = (told.status.restarts_used - used, told.status.restarts_free - free)
        assert taken in happening.restarts, yaml.safe_dump(told.as_data())
        if taken != NONE:
            why = failure_of_the_job(namespace)
            assert (taken == FREE) == bool(re.search("exit code 75|DisruptionTarget", why)), why
        used, free = told.status.restarts_used, told.status.restarts_free
        assert re.search(happening.words, told.last_restart), told.last_restart
        assert happening.words or "preempted" in json.dumps(told.as_data()["events"]).lower()
    backend.delete(NAME)
    backend.delete("urgent")
