"""The JobSet: one child Job per slice, one pod per host."""

from __future__ import annotations

from typing import Any

from launcher.manifest import names
from launcher.manifest.failure import backoff_limit, failure_policy, pod_failure_policy
from launcher.manifest.pod import pod_template
from launcher.spec import JobSpec
from launcher.spec.capacity import Dws, Exclusive
from trainer import contract

Manifest = dict[str, Any]


def jobset(spec: JobSpec) -> Manifest:
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": spec.name,
            "labels": {**names.labels(spec), **_queue_labels(spec)},
            **({"annotations": annotations} if (annotations := _annotations(spec)) else {}),
        },
        "spec": {
            **({} if spec.ttl_seconds is None else {"ttlSecondsAfterFinished": spec.ttl_seconds}),
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": spec.subdomain},
            "coordinator": {"replicatedJob": contract.REPLICATED_JOB, "jobIndex": 0, "podIndex": 0},
            "failurePolicy": failure_policy(spec),
            "replicatedJobs": [
                {"name": contract.REPLICATED_JOB, "replicas": spec.layout.slices, "template": {"spec": job(spec)}},
            ],
        },
    }


def job(spec: JobSpec) -> Manifest:
    """One slice: all its hosts at once, and one lost host fails it; its Job too, unless it has other hosts to replace it."""
    policy = pod_failure_policy(spec)
    return {
        "completionMode": "Indexed",
        "completions": spec.layout.hosts_per_slice,
        "parallelism": spec.layout.hosts_per_slice,
        "backoffLimit": backoff_limit(spec),
        "podReplacementPolicy": "Failed",
        **({"podFailurePolicy": policy} if policy else {}),
        "template": pod_template(spec),
    }


def _queue_labels(spec: JobSpec) -> dict[str, str]:
    if spec.queue is None:
        return {}
    found = {names.QUEUE_LABEL: spec.queue.name}
    if spec.queue.priority is not None:
        found[names.QUEUE_PRIORITY_LABEL] = spec.queue.priority
    if spec.queue.max_run_seconds is not None:
        found[names.QUEUE_MAX_SECONDS_LABEL] = str(spec.queue.max_run_seconds)
    return found


def _annotations(spec: JobSpec) -> dict[str, str]:
    found = dict(spec.annotations)
    if isinstance(spec.placed, Exclusive):
        found[names.EXCLUSIVE_ANNOTATION] = spec.placed.topology_key
    if isinstance(spec.capacity, Dws) and spec.capacity.max_run_seconds is not None:
        found[names.PROVISIONING_ANNOTATION] = str(spec.capacity.max_run_seconds)
    return found
