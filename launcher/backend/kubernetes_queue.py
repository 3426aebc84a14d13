"""What Kueue says about a queued job: a pure reading of its Workload."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from launcher.backend.status import QUEUE_LABEL, JobState, JobStatus, Manifest
from launcher.backend.values import items, mapping

GROUP = "kueue.x-k8s.io"


def workload_of(jobset: Manifest, workloads: Iterable[Manifest]) -> Manifest | None:
    """The Workload that the JobSet owns: found by uid, since its name is shortened and hashed."""
    uid = jobset["metadata"]["uid"]
    for workload in workloads:
        if any(owner.get("uid") == uid for owner in items(workload["metadata"].get("ownerReferences"))):
            return workload
    return None


def queued_status(status: JobStatus, workload: Manifest | None) -> JobStatus:
    """`status` of a job in state `queued` with Kueue's reason for it; any other status as it is."""
    if status.state is not JobState.QUEUED:
        return status
    queue = status.labels.get(QUEUE_LABEL, "")
    if workload is None:
        return replace(status, message=f"waiting in queue {queue}: Kueue has made no Workload for it yet")
    details = mapping(workload.get("status"))
    conditions = {condition["type"]: condition for condition in items(details.get("conditions"))}
    reserved, evicted = mapping(conditions.get("QuotaReserved")), mapping(conditions.get("Evicted"))
    if reserved.get("status") == "True":
        checks = [
            f"{check['name']} is {check['state']}" + (f" ({check['message']})" if check.get("message") else "")
            for check in items(details.get("admissionChecks"))
            if check.get("state") != "Ready"
        ]
        return replace(status, message=f"queue {queue} has reserved its quota; {'; '.join(checks) or 'it is about to start'}")
    said = [evicted.get("message") if evicted.get("status") == "True" else "", reserved.get("message")]
    reason = reserved.get("reason") or status.reason
    return replace(status, reason=reason, message=": ".join([f"waiting in queue {queue}", *filter(None, said)]))
