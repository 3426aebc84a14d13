"""Two slices of real pods, each a JAX world of its own: one is replaced beside the other, and its log is kept under its own number."""

from __future__ import annotations

import uuid

import pytest

from launcher.backend.kubernetes import KubernetesBackend
from launcher.manifest import render
from launcher.spec import from_document
from tests.cluster.test_end_to_end import TRAIN
from tests.cluster.test_recovery import KILL_CHILD
from tests.cluster.tools import document, kubectl, nnxlaunch
from tests.gcs_emulator import Gcs

NAME = "worlds"


def test_previous_has_every_line_of_a_pod_that_its_slice_has_replaced_by_itself(
    backend: KubernetesBackend, namespace: str, image: str, storage: Gcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in storage.environment.items():
        monkeypatch.setenv(name, value)
    train = {
        **TRAIN,
        "steps": 1_000_000,
        "mesh": {"ici": {"fsdp": 1}},
        "diloco": {"sync_every_steps": 10, "transport": {"type": "files", "wait_seconds": 600}},
        "checkpoint": {"every_steps": 1000},
        "metrics": {"log_every_steps": 10},
    }
    spec = document(
        NAME, cpu={"slices": 2, "hosts": 1, "devices_per_host": 1}, image={"reference": image, "pull_policy": "never"},
        directory=f"{storage.url}/{uuid.uuid4().hex[:8]}", env=storage.environment, train=train, grace_seconds=30,
        resources={"cpu": "50m", "memory": "2Gi"},
    )  # fmt: skip
    backend.create(render(from_document(spec)))
    lines: list[str] = []
    first: dict[int, str] = {}
    for line in backend.logs(NAME, follow=True, slice_index=1):
        lines.append(line.text)
        if line.text.startswith("[") and not first:
            first = {pod.slice_index: pod.name for pod in backend.get(NAME).pods}
            kubectl("-n", namespace, "exec", first[1], "--", "python", "-c", KILL_CHILD)
        if first and line.text.startswith("[") and any(text.startswith("exit code") for text in lines):
            break  # the next pod trains
    ended = next(index for index, text in enumerate(lines) if text.startswith("exit code 137"))

    status = backend.get(NAME)
    assert (status.attempt, status.restarts_used) == (0, 0), "nothing but the slice was restarted"
    now = {pod.slice_index: pod.name for pod in status.pods if pod.exit_code is None and not pod.leaving}
    assert now[0] == first[0] and now[1] != first[1]
    previous = nnxlaunch("logs", NAME, "--previous", "-n", namespace)
    assert previous.stdout.splitlines() == [f"[s1/w0 a0] {text}" for text in lines[: ended + 1]], previous.stderr
    kubectl("-n", namespace, "delete", "jobset", NAME, "--wait=false")
