"""A job of 64 slices of 8 hosts on 512 fake TPU nodes: how long `submit`, `status` and `why` take, and what they ask the API server.

Needs the test cluster, up: KUBECONFIG and CLUSTER_HOME as `.ci/run` sets them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import yaml

from launcher.backend import JobState
from launcher.backend.kubernetes import KubernetesBackend
from launcher.observe.report import report
from tests.bench.measure import Row, Spent, child_spent
from tests.cluster.tools import kubectl, own_namespace, until_told

SLICES, HOSTS = 64, 8
RUNS = 5
SPEC = {
    "name": "large",
    "tpu": {"type": "v6e-32", "slices": SLICES},
    "image": "python:3.12-slim",  # nothing runs on a fake node
    "directory": "gs://bucket/runs",
    "train": {
        "steps": 1000,
        "model": {"preset": "qwen3-0.6b"},
        "batch": {"global_batch": 2048, "sequence_length": 2048},
        "mesh": {"dcn": {"data": SLICES}, "ici": {"fsdp": 32}},
        "schedule": {"type": "constant", "learning_rate": 1e-3},
        "data": {"sources": [{"type": "python_standard_library"}]},
    },
}


def rows() -> list[Row]:
    if missing := [name for name in ("KUBECONFIG", "CLUSTER_HOME") if name not in os.environ]:
        raise SystemExit(f"error: {' and '.join(missing)} must say where the test cluster is; start it as .ci/run does")
    with _nodes(), own_namespace() as namespace, tempfile.TemporaryDirectory(prefix="bench-") as folder:
        spec = Path(folder, "job.yaml")
        spec.write_text(yaml.safe_dump(SPEC))
        begin = time.monotonic()
        subprocess.run([sys.executable, "-m", "launcher", "submit", str(spec), "-n", namespace], check=True, stdout=subprocess.DEVNULL)
        while _count(namespace, "pods") < SLICES * HOSTS:
            time.sleep(0.5)
        created = time.monotonic() - begin
        backend = KubernetesBackend(namespace=namespace)
        assert any(status.state is JobState.RUNNING for status in backend.watch("large", timeout_seconds=300))
        _settle(namespace)
        found = [Row(f"{SLICES * HOSTS} hosts: submit to all pods created", "s", created, 60, "the control plane included")]
        found += _looks(backend, {"status": ("status", "large"), "why": ("why", "large")})
        # The same again finds no place: nodes and the other jobs are read too.
        no_room = {**SPEC, "name": "second"}
        spec.write_text(yaml.safe_dump(no_room))
        subprocess.run([sys.executable, "-m", "launcher", "submit", str(spec), "-n", namespace], check=True, stdout=subprocess.DEVNULL)
        until_told(backend, "second", "chips-used")
        _settle(namespace)
        return found + _looks(backend, {"why, no room": ("why", "second")})


def _settle(namespace: str) -> None:
    """Until the cluster has had nothing new to say of the jobs for some seconds: it has the same processors as the launcher here."""
    begin = since = time.monotonic()
    said = _count(namespace, "events")
    while time.monotonic() - since < 10:
        if time.monotonic() - begin > 120:
            raise SystemExit("error: the cluster goes on changing; is a job of an earlier run still being removed?")
        time.sleep(1)
        if (now := _count(namespace, "events")) != said:
            said, since = now, time.monotonic()


def _looks(backend: KubernetesBackend, looks: dict[str, tuple[str, str]]) -> list[Row]:
    """In turns: a minute in which the machine is busy is in all of them."""
    spent: dict[str, list[Spent]] = {which: [] for which in looks}
    for _ in range(RUNS):
        for which, words in looks.items():
            spent[which].append(child_spent(["-m", "launcher", *words, "-n", backend.namespace]))
    return [row for which, (_, job) in looks.items() for row in _rows(backend, which, job, spent[which])]


def _rows(backend: KubernetesBackend, which: str, job: str, spent: list[Spent]) -> list[Row]:
    before = backend._api.requests
    report(backend.scene(job))
    asked = backend._api.requests - before
    what = f"{SLICES * HOSTS} hosts: {which}"
    ranges = [f"range {min(times):.2f}-{max(times):.2f}" for times in ([one.wall for one in spent], [one.cpu for one in spent])]
    return [
        Row(what, "s", median(one.wall for one in spent), 1.0, ranges[0]),
        Row(f"{what}, CPU", "CPU-s", median(one.cpu for one in spent), 1.0, ranges[1]),
        Row(f"{what}, requests", "count", asked, 5),
    ]


@contextmanager
def _nodes() -> Iterator[None]:
    script = [f"{os.environ['CLUSTER_HOME']}/fake-nodes.sh", "--type", "tpu-v6e-slice", "--topology", "4x8", "--pool-prefix", "bench"]
    try:
        subprocess.run([*script, "--slices", str(SLICES), "--hosts", str(HOSTS)], check=True, stdout=sys.stderr)
        yield
    finally:
        subprocess.run([*script, "--delete"], check=True, stdout=subprocess.DEVNULL)


def _count(namespace: str, plural: str) -> int:
    """How many there are; asked in a way that costs the server next to nothing."""
    page = json.loads(kubectl("get", "--raw", f"/api/v1/namespaces/{namespace}/{plural}?limit=1"))
    return len(page["items"]) + page["metadata"].get("remainingItemCount", 0)
