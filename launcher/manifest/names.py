"""Names, labels and annotations of the rendered objects, and what the servers derive from them."""

from __future__ import annotations

from typing import Final

from launcher.labels import MANAGED_BY, MANAGED_BY_LABEL, XPK_LABEL
from launcher.spec import JobSpec
from trainer import contract
from trainer.config.diloco import worlds_apart

JOB_LABEL: Final = "nnxlaunch/job"
SPEC_HASH_LABEL: Final = "nnxlaunch/spec-hash"

XPK_QUEUE: Final = "multislice-queue"
"""The LocalQueue of every cluster that XPK has made, in its namespace `default`."""

JOBSET_NAME_LABEL: Final = "jobset.sigs.k8s.io/jobset-name"
JOB_INDEX_LABEL: Final = "jobset.sigs.k8s.io/job-index"
JOB_UID_LABEL: Final = "batch.kubernetes.io/controller-uid"
RESTART_ATTEMPT_LABEL: Final = "jobset.sigs.k8s.io/restart-attempt"
EXCLUSIVE_ANNOTATION: Final = "alpha.jobset.sigs.k8s.io/exclusive-topology"
GCSFUSE_ANNOTATION: Final = "gke-gcsfuse/volumes"

QUEUE_LABEL: Final = "kueue.x-k8s.io/queue-name"
QUEUE_PRIORITY_LABEL: Final = "kueue.x-k8s.io/priority-class"
QUEUE_MAX_SECONDS_LABEL: Final = "kueue.x-k8s.io/max-exec-time-seconds"
PROVISIONING_ANNOTATION: Final = "provreq.kueue.x-k8s.io/maxRunDurationSeconds"
TAS_REQUIRED_ANNOTATION: Final = "kueue.x-k8s.io/podset-required-topology"
TAS_SLICE_ANNOTATION: Final = "kueue.x-k8s.io/podset-slice-required-topology"
TAS_SLICE_SIZE_ANNOTATION: Final = "kueue.x-k8s.io/podset-slice-size"
TPU_SLICE_TOPOLOGY_ANNOTATION: Final = "cloud.google.com/gke-tpu-slice-topology"


def labels(spec: JobSpec) -> dict[str, str]:
    """Labels of every object of the job; the user's own come first so that ours cannot be replaced."""
    xpk = {XPK_LABEL: spec.name} if spec.queue is not None and spec.queue.name == XPK_QUEUE else {}
    return {**spec.labels, **xpk, MANAGED_BY_LABEL: MANAGED_BY, JOB_LABEL: spec.name, SPEC_HASH_LABEL: spec.hash}


def config_map(spec: JobSpec) -> str:
    return f"{spec.name}-train"


def service_account(spec: JobSpec) -> str:
    return spec.service_account or spec.name


def pod_host(spec: JobSpec, *, job_index: int | str, pod_index: int) -> str:
    """Host name of a pod, as the pods of its namespace resolve it."""
    return f"{spec.name}-{contract.REPLICATED_JOB}-{job_index}-{pod_index}.{spec.subdomain}"


def coordinator(spec: JobSpec) -> str:
    """`host:port` of process 0; of the first host of a pod's own slice, for Kubernetes to fill in, where every slice is a world."""
    index = f"$({contract.JOB_INDEX})" if worlds_apart(spec.train) else "0"
    return f"{pod_host(spec, job_index=index, pod_index=0)}:{spec.network.coordinator_port}"
