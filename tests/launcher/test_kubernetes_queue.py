"""Why a queued job waits, in Kueue's words; the Workloads were recorded from Kueue 0.18."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.backend.kubernetes_queue import queued_status, workload_of
from launcher.backend.status import JobState, Manifest, job_status

JOBSET: Manifest = {
    "metadata": {"name": "a", "namespace": "team-a", "uid": "u1", "labels": {"kueue.x-k8s.io/queue-name": "tpu"}},
    "spec": {"suspend": True, "replicatedJobs": [{"name": "slice", "replicas": 1, "template": {"spec": {"completions": 2}}}]},
}


def condition(kind: str, status: bool, reason: str, message: str) -> dict[str, Any]:
    return {"type": kind, "status": str(status), "reason": reason, "message": message}


def workload(*conditions: dict[str, Any], checks: list[dict[str, Any]] | None = None, uid: str = "u1") -> Manifest:
    return {
        "metadata": {"name": "jobset-a-12345", "ownerReferences": [{"kind": "JobSet", "name": "a", "uid": uid}]},
        "status": {"conditions": list(conditions), "admissionChecks": checks},
    }


NO_QUOTA = condition("QuotaReserved", False, "Pending", "couldn't assign flavors to pod set slice: insufficient unused quota")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "waiting in queue tpu: Kueue has made no Workload for it yet"),
        (workload(), "waiting in queue tpu"),
        (workload(NO_QUOTA), f"waiting in queue tpu: {NO_QUOTA['message']}"),
        (
            workload(condition("Evicted", True, "Preempted", "Preempted to accommodate a workload"), NO_QUOTA),
            f"waiting in queue tpu: Preempted to accommodate a workload: {NO_QUOTA['message']}",
        ),
        (
            workload(
                condition("QuotaReserved", True, "QuotaReserved", ""), checks=[{"name": "dws", "state": "Pending", "message": "ETA 2 h"}]
            ),
            "queue tpu has reserved its quota; dws is Pending (ETA 2 h)",
        ),
    ],
)
def test_a_queued_job_says_what_it_waits_for(found: Manifest | None, message: str) -> None:
    status = queued_status(job_status(JOBSET, []), found)
    assert status.state is JobState.QUEUED
    assert status.message == message


def test_a_workload_is_found_by_its_owner_and_a_running_job_keeps_its_status() -> None:
    mine = workload(NO_QUOTA)
    assert workload_of(JOBSET, [workload(uid="u2"), mine]) is mine
    assert workload_of(JOBSET, [workload(uid="u2")]) is None
    running = job_status({**JOBSET, "spec": {**JOBSET["spec"], "suspend": False}}, [])
    assert queued_status(running, mine) == running
