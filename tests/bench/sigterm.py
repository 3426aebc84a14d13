"""From the signal that ends a pod to the trainer's process, in real pods, by the kernel's own clock.

Needs the test cluster, up, with the trainer's image in its node, on this machine, as root: KUBECONFIG and TEST_IMAGE as `.ci/run`
sets them. The kernel traces who sends SIGTERM to whom: containerd, on behalf of the kubelet, to process 1 of the container, the
trainer's parent; the parent to the trainer; and when the trainer takes it.
"""

from __future__ import annotations

import os
import re
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from launcher.backend.kubernetes import KubernetesBackend
from launcher.manifest import render
from launcher.spec import from_document
from tests.bench.measure import Row
from tests.cluster.long_run import Run
from tests.cluster.node import first_process, node_address
from tests.cluster.test_end_to_end import TRAIN
from tests.cluster.tools import document, kubectl, own_namespace
from tests.gcs_emulator import gcs_emulator

ROUNDS = 2
NAME = "signalled"
TRACING = Path("/sys/kernel/tracing")
EVENT = re.compile(r"-(?P<current>\d+) .* (?P<seconds>\d+\.\d+): (?P<what>signal_\w+): sig=15 .*?(?:pid=(?P<target>\d+) |$)", re.MULTILINE)


def rows() -> list[Row]:
    if missing := [name for name in ("KUBECONFIG", "TEST_IMAGE") if name not in os.environ]:
        raise SystemExit(f"error: {' and '.join(missing)} must say where the test cluster and the image are; see .ci/run")
    with gcs_emulator(node_address()) as storage, own_namespace() as namespace, _trace() as trace:
        train = {**TRAIN, "steps": 1_000_000, "checkpoint": {"every_steps": 100_000}, "metrics": {"log_every_steps": 10}}
        spec = document(
            NAME, cpu={"slices": 2, "hosts": 2, "devices_per_host": 1},
            image={"reference": os.environ["TEST_IMAGE"], "pull_policy": "never"},
            directory=f"{storage.url}/{uuid.uuid4().hex[:8]}", env=storage.environment, train=train, grace_seconds=60,
            resources={"cpu": "50m", "memory": "3Gi"},
        )  # fmt: skip
        backend = KubernetesBackend(namespace=namespace)
        backend.create(render(from_document(spec)))
        run = Run(backend, NAME)
        found: list[tuple[float, float]] = []
        for _ in range(ROUNDS):
            run.until(r"\[ *\d+/1000000\]")
            hosts = [_Host.of(pod.name) for pod in backend.get(NAME).pods if not pod.leaving]
            (trace / "trace").write_text("")
            kubectl("-n", namespace, "delete", "pods", "--all", "--wait=false")
            run.until(r"resumed: step")
            events = [match for match in EVENT.finditer((trace / "trace").read_text())]
            found += [host.seconds(events) for host in hosts]
        parent, trainer = ([1000 * pair[which] for pair in found] for which in (0, 1))
        note = f"worst of {len(found)}, median {median(trainer):.2f}; the parent passes it on within {max(parent):.2f}"
        return [Row("SIGTERM to the trainer, real pods", "ms", max(trainer), 50, note)]


@dataclass(frozen=True)
class _Host:
    parent: int
    trainer: int
    threads: frozenset[int]  # of the trainer

    @classmethod
    def of(cls, pod: str) -> _Host:
        parent = first_process(pod)
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and re.search(rf"^PPid:\t{parent}$", (entry / "status").read_text(), re.MULTILINE):
                if b"trainer.worker" in (entry / "cmdline").read_bytes():
                    return cls(parent, int(entry.name), frozenset(int(task.name) for task in (entry / "task").iterdir()))
        raise AssertionError(f"no trainer in {pod}")

    def seconds(self, events: list[re.Match[str]]) -> tuple[float, float]:
        """From the signal to the parent: until the parent has sent it on, and until the trainer takes it."""

        def first(what: str, pids: frozenset[int], key: str) -> float:
            return next(float(event["seconds"]) for event in events if event["what"] == what and int(event[key] or 0) in pids)

        sent = first("signal_generate", frozenset({self.parent}), "target")
        passed = first("signal_generate", frozenset({self.trainer}), "target")
        taken = first("signal_deliver", self.threads, "current")
        return passed - sent, taken - sent


@contextmanager
def _trace() -> Iterator[Path]:
    """An instance of the kernel's tracing that sees SIGTERM alone."""
    if not (TRACING / "instances").is_dir():
        subprocess.run(["mount", "-t", "tracefs", "nodev", str(TRACING)], check=True)
    instance = TRACING / "instances" / f"bench-{os.getpid()}"
    instance.mkdir()
    try:
        (instance / "trace_clock").write_text("mono")
        for event in ("signal_generate", "signal_deliver"):
            (instance / "events/signal" / event / "filter").write_text("sig == 15")
            (instance / "events/signal" / event / "enable").write_text("1")
        yield instance
    finally:
        instance.rmdir()
