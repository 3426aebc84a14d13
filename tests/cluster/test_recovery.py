"""One run of the real trainer through all that can happen to it: it goes on from its last committed checkpoint, by itself."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import uuid
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import yaml

from launcher.backend import Manifest
from launcher.backend.kubernetes import KubernetesBackend
from launcher.manifest import render
from launcher.observe.report import Report, report
from launcher.spec import from_document
from tests.cluster.test_end_to_end import TRAIN
from tests.cluster.test_failure_matrix import take_away
from tests.cluster.test_queue import KUEUE
from tests.cluster.tools import cheap_job, document, kubectl
from tests.gcs_emulator import Gcs

NAME = "long"
PATIENCE_SECONDS = 300
LIMITS = {"cpu": "50m", "memory": "1536Mi"}
SCRATCH_MIB = 64  # of /tmp, in this test
KILL_CHILD = """
import os, signal
for entry in filter(str.isdigit, os.listdir("/proc")):
    with open(f"/proc/{entry}/cmdline", "rb") as file:
        if b"trainer.worker" in file.read():
            os.kill(int(entry), signal.SIGKILL)
            break
else:
    raise SystemExit("no trainer")
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


class Run:
    """A job whose log is followed; waits are for lines of process 0."""

    def __init__(self, backend: KubernetesBackend) -> None:
        self.backend = backend
        self.lines: list[str] = []
        self.read = 0
        self.committed = 0
        self._more = threading.Condition()
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        for line in self.backend.logs(NAME, follow=True, slice_index=0, worker=0):
            with self._more:
                self.lines.append(line.text)
                self._more.notify()

    def until(self, pattern: str) -> re.Match[str]:
        """The next line that matches, of those not looked at yet."""

        def found() -> re.Match[str] | None:
            while self.read < len(self.lines):
                self.read += 1
                if match := re.search(pattern, self.lines[self.read - 1]):
                    return match
            return None

        with self._more:
            match = self._more.wait_for(found, PATIENCE_SECONDS)
        assert match, f"no {pattern!r} in:\n" + "\n".join(self.lines[-60:])
        return match

    def commits(self) -> None:
        """A newer checkpoint than all before it."""
        while (step := int(self.until(r"checkpoint committed: step (\d+)")[1])) <= self.committed:
            pass
        self.committed = step

    def goes_on(self) -> None:
        """By itself, from its last checkpoint, to a newer one."""
        assert int(self.until(r"resumed: step (\d+)")[1]) >= self.committed
        self.commits()

    def pod(self, worker: int) -> str:
        (name,) = (pod.name for pod in self.backend.get(NAME).pods if pod.worker == worker and not pod.leaving)
        return name

    def execute(self, worker: int, program: str) -> str:
        """In the container of a host, which may be gone before it is done; what it prints."""
        command = ["kubectl", "-n", self.backend.namespace, "exec", self.pod(worker), "--", "python", "-c", program]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)
        return done.stdout

    def told(self) -> Report:
        return report(self.backend.scene(NAME))


COUNTED, FREE, NONE = (1, 0), (0, 1), (0, 0)
"""Restarts used and free."""


def happenings(run: Run, namespace: str, queue: str) -> Iterator[tuple[str, set[tuple[int, int]]]]:
    """Each makes one thing happen; then what `status` must say of it, and the restarts it may have taken."""
    run.execute(0, KILL_CHILD)  # the coordinator's process
    yield "slice 0, worker 0 exited with 137: killed with SIGKILL", {COUNTED}
    run.execute(1, USE_UP_MEMORY)
    yield "slice 0, worker 1 exited with 137: killed: out of memory", {COUNTED}
    run.execute(1, FILL_SCRATCH)
    # The kubelet sets no DisruptionTarget for a pod's own fault: counted, or free where a host has saved and left (75) before.
    yield "slice 0, worker 1 was evicted: .*EmptyDir", {COUNTED, FREE}
    node = kubectl("get", "nodes", "-o", "jsonpath={.items[0].metadata.name}")
    kubectl("cordon", node)
    take_away(namespace, run.pod(0), evict=True)
    kubectl("uncordon", node)
    yield r"slice 0, worker \d exited with 75", {FREE}  # both leave together, and either may be first
    run.backend.create(cheap_job("urgent", "print('done')", queue={"name": queue, "priority": namespace}, resources=LIMITS))
    # Nothing has failed, unless the place is free again while the old pods still leave with 75. The events of Kueue tell.
    yield "", {NONE, FREE}


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
        resources=LIMITS, failure={"max_restarts": 3},
    )  # fmt: skip
    manifests = render(from_document(spec))
    pod = manifests[-1]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    next(volume for volume in pod["volumes"] if volume["name"] == "tmp")["emptyDir"] = {"sizeLimit": f"{SCRATCH_MIB}Mi"}
    backend.create(manifests)
    run = Run(backend)
    run.commits()
    first, *others = run.execute(0, PROCESSES).splitlines()
    assert first == "1 python -m trainer --config", "no shell between the kubelet's signal and the trainer's parent"
    assert [line.split()[3] for line in others[:2]] == ["trainer.worker", "trainer.parent.uploader"]
    used = free = 0
    for words, restarts in happenings(run, namespace, queue):
        run.goes_on()
        told = run.told()
        taken = (told.status.restarts_used - used, told.status.restarts_free - free)
        assert taken in restarts, yaml.safe_dump(told.as_data())
        used, free = told.status.restarts_used, told.status.restarts_free
        assert re.search(words, told.last_restart), told.last_restart
        assert words or "preempted" in json.dumps(told.as_data()["events"]).lower()
    backend.delete(NAME)
    backend.delete("urgent")
