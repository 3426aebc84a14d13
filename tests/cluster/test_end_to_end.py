"""Two slices of two hosts, from the queue to the end, with a host killed on the way: losses as of a run that nothing disturbed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.cloud import storage as gcs

from launcher.backend import JobState, Manifest
from launcher.backend.kubernetes import KubernetesBackend
from launcher.observe.report import report
from tests.cluster.node import first_process
from tests.cluster.test_queue import KUEUE
from tests.cluster.tools import document, kubectl, nnxlaunch, until_told
from tests.gcs_emulator import Gcs

STEPS = 100
CHIPS = 4  # of each pod; the node says that it has 64, and the queue has as many as one job needs
STEP = re.compile(rf"\[s0/w0 a0\] \[ *(\d+)/{STEPS}\]")
TRAIN: dict[str, Any] = {
    "steps": STEPS,
    "model": {
        "vocab_size": 64,
        "width": 32,
        "compute_dtype": "float32",
        "remat": "none",
        "segments": [{"repeats": 2, "pattern": [{"attention": {"heads": 2, "kv_heads": 2, "head_dim": 8}, "mlp": {"hidden": 48}}]}],
    },
    "batch": {"global_batch": 16, "sequence_length": 32},
    "mesh": {"dcn": {"data": 2}, "ici": {"fsdp": 2}},
    "schedule": {"type": "constant", "learning_rate": 3e-3},
    "data": {"sources": [{"type": "synthetic"}]},
    "checkpoint": {"every_steps": 20},
    "metrics": {"log_every_steps": 1},
    "distributed": {"heartbeat_timeout_seconds": 30},  # a busy machine is no lost peer
}


@pytest.fixture
def queue(namespace: str) -> Generator[str]:
    resources = [{"name": name, "nominalQuota": quota} for name, quota in (("cpu", "2"), ("memory", "64Gi"), ("google.com/tpu", 4 * CHIPS))]
    groups = [{"coveredResources": [r["name"] for r in resources], "flavors": [{"name": "nnx-e2e", "resources": resources}]}]
    objects: list[Manifest] = [
        {"kind": "ResourceFlavor", "metadata": {"name": "nnx-e2e"}},
        {"kind": "ClusterQueue", "metadata": {"name": "nnx-e2e"}, "spec": {"namespaceSelector": {}, "resourceGroups": groups}},
        {"kind": "LocalQueue", "metadata": {"name": "e2e", "namespace": namespace}, "spec": {"clusterQueue": "nnx-e2e"}},
    ]
    everything = json.dumps({"apiVersion": "v1", "kind": "List", "items": [{"apiVersion": KUEUE, **thing} for thing in objects]})
    kubectl("apply", "-f", "-", stdin=everything)
    yield "e2e"
    kubectl("delete", "--ignore-not-found", "--wait=false", "-f", "-", stdin=everything)


def rendered(tmp_path: Path, name: str, image: str, directory: str, storage: Gcs) -> list[Manifest]:
    """What `nnxlaunch render` prints, with chips asked for: a CPU image on a node that says it has TPUs."""
    spec = document(
        name, cpu={"slices": 2, "hosts": 2, "devices_per_host": 1}, image={"reference": image, "pull_policy": "never"},
        directory=directory, queue="e2e", env=storage.environment, train=TRAIN, grace_seconds=60,
        resources={"cpu": "50m", "memory": "3Gi"}, failure={"max_restarts": 2},
    )  # fmt: skip
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(spec))
    manifests = list(yaml.safe_load_all(nnxlaunch("render", str(path)).stdout))
    for manifest in manifests:
        if manifest["kind"] == "JobSet":
            (container,) = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
            for kind in ("requests", "limits"):
                container["resources"].setdefault(kind, {})["google.com/tpu"] = CHIPS
    return manifests


def losses(storage: Gcs, directory: str) -> dict[int, list[float]]:
    """Every loss on record of each step, of all attempts."""
    bucket = gcs.Client(project="test").bucket(storage.bucket)
    prefix = f"{directory.removeprefix(f'{storage.url}/')}/metrics/"
    found: dict[int, list[float]] = {}
    for blob in bucket.list_blobs(prefix=prefix):
        for line in blob.download_as_bytes().splitlines() if blob.name.endswith(".jsonl") else ():
            record = json.loads(line)
            if record["kind"] == "step":
                found.setdefault(record["step"], []).append(record["loss"])
    return found


def test_a_killed_host_costs_nothing_but_time(
    backend: KubernetesBackend, namespace: str, image: str, storage: Gcs, queue: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in storage.environment.items():
        monkeypatch.setenv(name, value)
    directory = f"{storage.url}/{uuid.uuid4().hex[:8]}"
    calm, hit = (rendered(tmp_path, name, image, directory, storage) for name in ("calm", "hit"))
    kubectl("-n", namespace, "apply", "-f", "-", stdin=yaml.safe_dump_all(calm))  # as a person without this launcher would
    backend.create(hit)

    follow = [sys.executable, "-m", "launcher", "logs", "hit", "-f", "-n", namespace]
    victim, saved, killed, lines, seen = 0, False, False, list[str](), list[int]()
    with subprocess.Popen(follow, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as logs:
        waited = until_told(backend, "hit", "quota-used")
        for line in logs.stdout or ():
            lines.append(line.rstrip("\n"))
            if not victim and STEP.search(line):
                (pod,) = (p.name for p in backend.get("hit").pods if (p.slice_index, p.worker) == (1, 1))
                victim = first_process(pod)
            saved = saved or "checkpoint committed: step 20" in line
            if saved and not killed and STEP.search(line):
                os.kill(victim, signal.SIGKILL)
                killed = True
                seen = [int(step[1]) for line in lines if (step := STEP.search(line))]
    text = "\n".join(lines)

    assert "google.com/tpu" in waited.sentence and "calm" in waited.sentence, waited
    status = backend.get("hit")
    assert (status.state, status.restarts_used, status.restarts_free) == (JobState.COMPLETED, 1, 0), f"{status}\n{text}"
    assert killed and "[s0/w0 a1] resumed: step" in text, text
    for pod in status.pods:
        own = kubectl("-n", namespace, "logs", pod.name).splitlines()
        prefix = f"[s{pod.slice_index}/w{pod.worker} a1] "
        assert [line.removeprefix(prefix) for line in lines if line.startswith(prefix)] == own

    assert backend.get("calm").state is JobState.COMPLETED
    undisturbed, resumed = losses(storage, f"{directory}/calm"), losses(storage, f"{directory}/hit")
    assert sorted(undisturbed) == sorted(resumed) == list(range(STEPS))
    assert {step: set(found) for step, found in resumed.items()} == {step: set(found) for step, found in undisturbed.items()}
    begun = re.search(r"\[s0/w0 a1\] resumed: step (\d+)", text)
    assert begun and int(begun[1]) >= 20, text
    # What process 0 had done when its peer was killed is on record, though JAX aborted it; it is done again, and gave the same.
    assert {step: len(found) for step, found in resumed.items() if int(begun[1]) <= step < seen[-1]} == {
        step: 2 for step in range(int(begun[1]), seen[-1])
    }
    assert sum(map(len, resumed.values())) > STEPS, "some steps were done twice"

    previous = nnxlaunch("logs", "hit", "--previous", "-n", namespace).stdout.splitlines()
    for host in ("[s0/w0 a0] ", "[s0/w1 a0] ", "[s1/w0 a0] "):  # those that outlived the killed one
        kept = [line for line in previous if line.startswith(host)]
        assert kept and kept == [line for line in lines if line.startswith(host)]
        assert kept[-1].startswith(f"{host}exit code 76")

    told = report(backend.scene("hit"))
    assert told.cause.code == "completed"
    assert told.progress and told.progress.done == STEPS
    backend.delete("hit")
    kubectl("-n", namespace, "delete", "jobset", "calm", "--wait=false")
