"""What the rendered failure policy does on real pods, and what the backend says about it."""

from __future__ import annotations

import time

import pytest

from launcher.backend import JobState, JobStatus
from launcher.backend.kubernetes import KubernetesBackend
from tests.cluster.tools import cheap_job, kubectl

# The first attempt ends with CODE on worker 1 while worker 0 waits for its SIGTERM, as a survivor does.
PROGRAM = """
import os, signal, sys, time
attempt, worker = int(os.environ["NNX_RESTART_ATTEMPT"]), int(os.environ["JOB_COMPLETION_INDEX"])
print("attempt", attempt, "worker", worker)
if attempt:
    sys.exit(0)
if worker == 1:
    sys.exit(CODE)
signal.sigtimedwait([signal.SIGTERM], 60)
sys.exit(75)
"""


def ended(backend: KubernetesBackend, name: str) -> JobStatus:
    *_, last = backend.watch(name, timeout_seconds=120)
    return last


@pytest.mark.parametrize(
    ("code", "max_restarts", "state", "used", "free"),
    [
        (75, 0, JobState.COMPLETED, 0, 1),
        (64, 3, JobState.FAILED, 0, 0),
        (134, 1, JobState.COMPLETED, 1, 0),
        (134, 0, JobState.FAILED, 0, 0),
    ],
    ids=["75-is-free", "64-is-fatal", "134-is-counted", "134-without-budget"],
)
def test_an_exit_code_has_its_effect(
    backend: KubernetesBackend, code: int, max_restarts: int, state: JobState, used: int, free: int
) -> None:
    name = f"exit-{code}-{max_restarts}"
    backend.create(cheap_job(name, PROGRAM.replace("CODE", str(code)), failure={"max_restarts": max_restarts}))
    lines = [(line.attempt, line.worker) for line in backend.logs(name, follow=True) if line.text.startswith("attempt")]
    status = ended(backend, name)
    assert (status.state, status.restarts_used, status.restarts_free) == (state, used, free)
    assert {(0, 0), (0, 1)} <= set(lines)
    if state is JobState.COMPLETED:
        assert sorted(lines) == [(0, 0), (0, 1), (1, 0), (1, 1)], "logs are followed over the restart, each line once"
    else:
        assert f"worker 1 exited with {code}" in status.message
    backend.delete(name)


def test_a_job_is_deleted_with_everything_that_was_made_for_it(backend: KubernetesBackend, namespace: str) -> None:
    name = "gone"
    backend.create(cheap_job(name, "import signal; signal.sigwait([signal.SIGTERM])"))
    for status in backend.watch(name, timeout_seconds=60):
        if status.state is JobState.RUNNING:
            break
    owned = ("configmap/gone-train", "serviceaccount/gone", "networkpolicy/gone")
    for thing in owned:
        assert kubectl("-n", namespace, "get", thing, "-o", "jsonpath={.metadata.ownerReferences[0].kind}") == "JobSet"
    began = time.monotonic()
    backend.delete(name)
    assert time.monotonic() - began < 20
    left = kubectl("-n", namespace, "get", "jobsets,jobs,pods,configmaps,serviceaccounts,networkpolicies,services", "-o", "name").split()
    assert not [thing for thing in left if "/gone" in thing]
