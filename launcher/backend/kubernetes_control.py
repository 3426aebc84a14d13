"""Hold a job back and let it go on. Who owns `spec.suspend` decides how: under a queue it is Kueue, which is asked to take
the job out (its Workload's `spec.active`), and the quota is free for others; without a queue it is the JobSet's own field.
"""

from __future__ import annotations

from typing import Final

from launcher.backend.kubernetes_api import JOBSET, Api, Resource
from launcher.backend.kubernetes_queue import GROUP, workload_of
from launcher.backend.kubernetes_submit import UNFINISHED
from launcher.backend.status import QUEUE_LABEL, Manifest
from launcher.backend.values import items, mapping
from launcher.errors import NnxlaunchError

RESUBMIT: Final = "nnxlaunch submit SPEC --replace; it goes on from its last committed checkpoint"


def hold(api: Api, jobset: Manifest) -> None:
    """Ask for it; the pods have their grace period to save. Raises NnxlaunchError for a job that has ended."""
    name = jobset["metadata"]["name"]
    _refuse_ended(jobset)
    if QUEUE_LABEL in mapping(jobset["metadata"].get("labels")):
        _set_active(api, jobset, active=False)
    else:
        api.merge(JOBSET, jobset["metadata"]["namespace"], name, {"spec": {"suspend": True}})


def let_go(api: Api, jobset: Manifest) -> None:
    """Ask for it; under a queue the job queues again. Raises NnxlaunchError for a job that has ended or is not held back."""
    metadata = jobset["metadata"]
    _refuse_ended(jobset)
    if UNFINISHED in mapping(metadata.get("annotations")):
        raise NnxlaunchError(f"{metadata['name']} is half made: its submit was interrupted", hint="submit the same spec again")
    if not jobset["spec"].get("suspend"):
        raise NnxlaunchError(f"{metadata['name']} is not suspended", hint=f"look with: nnxlaunch status {metadata['name']}")
    if QUEUE_LABEL in mapping(metadata.get("labels")):
        _set_active(api, jobset, active=True)
    else:
        api.merge(JOBSET, metadata["namespace"], metadata["name"], {"spec": {"suspend": False}})


def _refuse_ended(jobset: Manifest) -> None:
    for condition in items(mapping(jobset.get("status")).get("conditions")):
        if condition["status"] == "True" and condition["type"] in ("Completed", "Failed"):
            how = condition["type"].lower()
            raise NnxlaunchError(f"{jobset['metadata']['name']} has ended ({how}); an ended JobSet never starts again", hint=RESUBMIT)


def _set_active(api: Api, jobset: Manifest, *, active: bool) -> None:
    metadata = jobset["metadata"]
    version = api.served_version(GROUP)
    resource = Resource(version, "Workload", "workloads") if version else None
    workload = workload_of(jobset, api.list(resource, metadata["namespace"])) if resource else None
    if resource is None or workload is None:
        queue = metadata["labels"][QUEUE_LABEL]
        raise NnxlaunchError(
            f"{metadata['name']} waits in queue {queue}, but Kueue has made no Workload for it: nothing of it runs",
            hint=f"is there a LocalQueue {queue!r}? look with: nnxlaunch doctor; to take the job out: nnxlaunch cancel {metadata['name']}",
        )
    api.merge(resource, metadata["namespace"], workload["metadata"]["name"], {"spec": {"active": active}})
