"""Situations a job can be in, each made on a real control plane, with what `why` must say about it.

`python -m tests.cluster.record` makes all of them and keeps what the launcher reads of each in tests/launcher/situations;
tests/launcher/test_why.py judges the answers from there, tests/cluster/test_why.py makes a sample of them again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from launcher.backend import Manifest
from launcher.backend.kubernetes import KubernetesBackend
from tests.cluster.tools import cheap_job, kubectl

KUEUE: Final = "kueue.x-k8s.io/v1beta2"
ABSENT_IMAGE: Final = "registry.invalid/team/trainer:v1"
SLEEP: Final = "import signal; signal.sigwait([signal.SIGTERM])"
DEAF: Final = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
ENDS: Final = """
import os, signal, sys
if os.environ["JOB_COMPLETION_INDEX"] == "1":
    CAUSE
signal.sigtimedwait([signal.SIGTERM], 60)
sys.exit(75)
"""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Objects to apply and a kubectl command, then wait until the scene of `job` has all the words of `until`."""

    apply: tuple[Manifest, ...] = ()
    run: tuple[str, ...] = ()
    call: Callable[[KubernetesBackend], object] | None = None
    until: tuple[str, ...]
    job: str = "train"


@dataclass(frozen=True, kw_only=True)
class Situation:
    name: str
    code: str  # of the cause that must be found
    words: tuple[str, ...]  # in its sentence
    fix: str  # in what to do
    steps: Callable[[str], list[Step]]  # of the namespace
    sampled: bool = False  # made again by the cluster test
    level: str = "privileged"  # of Pod Security
    namespace: str = ""  # an existing one, instead of one of its own


SITUATIONS: list[Situation] = []


def situation(
    code: str, *words: str, fix: str, sampled: bool = False, level: str = "privileged", namespace: str = ""
) -> Callable[[Callable[[str], list[Step]]], Callable[[str], list[Step]]]:
    def register(steps: Callable[[str], list[Step]]) -> Callable[[str], list[Step]]:
        name = steps.__name__.replace("_", "-")
        SITUATIONS.append(
            Situation(name=name, code=code, words=words, fix=fix, steps=steps, sampled=sampled, level=level, namespace=namespace)
        )
        return steps

    return register


def job(
    ns: str,
    program: str = SLEEP,
    *,
    name: str = "train",
    pod: Callable[[Manifest], None] | None = None,
    jobset: Callable[[Manifest], None] | None = None,
    **changes: Any,
) -> tuple[Manifest, ...]:
    """A rendered job whose containers run a few lines of Python; `pod` and `jobset` change its pod spec and the JobSet."""
    manifests = cheap_job(name, program, **changes)
    for manifest in manifests:
        manifest["metadata"]["namespace"] = ns
        if manifest["kind"] == "JobSet":
            if pod:
                pod(manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"])
            if jobset:
                jobset(manifest)
    return tuple(manifests)


def tpu(accelerator: str, topology: str, **changes: Any) -> dict[str, Any]:
    return {"cpu": None, "tpu": {"accelerator": accelerator, "topology": topology}, "placement": "none", **changes}


def container(change: Callable[[Manifest], None]) -> Callable[[Manifest], None]:
    return lambda pod: change(pod["containers"][0])


def ends(cause: str) -> str:
    return ENDS.replace("CAUSE", cause)


def queue(
    ns: str, *, cpu: str = "1", stop: str = "", local: dict[str, Any] | None = None, flavor: dict[str, Any] | None = None, **spec: Any
):
    """A flavor, a cluster queue with some CPU and memory, and local queue `tpu`."""
    resources = [{"name": "cpu", "nominalQuota": cpu}, {"name": "memory", "nominalQuota": "1Gi"}]
    groups = [{"coveredResources": ["cpu", "memory"], "flavors": [{"name": ns, "resources": resources}]}]
    stopped = {"stopPolicy": stop} if stop else {}
    return (
        {"apiVersion": KUEUE, "kind": "ResourceFlavor", "metadata": {"name": ns}, "spec": flavor or {}},
        {
            "apiVersion": KUEUE, "kind": "ClusterQueue", "metadata": {"name": ns},
            "spec": {"namespaceSelector": {}, "resourceGroups": groups, **stopped, **spec},
        },
        {
            "apiVersion": KUEUE, "kind": "LocalQueue", "metadata": {"name": "tpu", "namespace": ns},
            "spec": {"clusterQueue": ns, **(local or {})},
        },
    )  # fmt: skip


def nodes(ns: str, accelerator: str, topology: str, count: int, *, taints: tuple[Manifest, ...] = (), **annotations: str):
    """Fake hosts of four chips."""
    common = [{"key": "google.com/tpu", "value": "present", "effect": "NoSchedule"}, *taints]
    room = {"cpu": "180", "memory": "720Gi", "ephemeral-storage": "90Gi", "pods": "64", "google.com/tpu": "4"}
    return tuple(
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": f"{ns}-{index}",
                "annotations": {"kwok.x-k8s.io/node": "fake", **annotations},
                "labels": {
                    "kubernetes.io/hostname": f"{ns}-{index}",
                    "cloud.google.com/gke-tpu-accelerator": accelerator,
                    "cloud.google.com/gke-tpu-topology": topology,
                    "cloud.google.com/gke-nodepool": ns,
                    "nnx.test/situation": ns,
                },
            },
            "spec": {"taints": common},
            "status": {"capacity": room, "allocatable": room},
        }
        for index in range(count)
    )


def once(*apply: Manifest, until: tuple[str, ...] | str) -> list[Step]:
    return [Step(apply=apply, until=(until,) if isinstance(until, str) else until)]


# ---------------------------------------------------------------- in the queue


@situation("no-local-queue", "queue 'nobody-made-it' does not exist", fix="localqueues", sampled=True)
def queue_missing(ns: str) -> list[Step]:
    return once(*job(ns, queue="nobody-made-it"), until="doesn't exist")


@situation("no-cluster-queue", "queue 'tpu' leads to cluster queue 'nowhere', which does not exist", fix="administrator")
def queue_leads_nowhere(ns: str) -> list[Step]:
    return once(*queue(ns, local={"clusterQueue": "nowhere"}), *job(ns, queue="tpu"), until="doesn't exist")


@situation("queue-inactive", "is not active", "flavor", fix="resourceflavor")
def queue_inactive(ns: str) -> list[Step]:
    return once(*queue(ns)[1:], *job(ns, queue="tpu"), until=("FlavorNotFound", "is inactive"))


@situation("queue-stopped", "is stopped", fix="stopPolicy")
def queue_stopped(ns: str) -> list[Step]:
    return once(*queue(ns, stop="Hold"), *job(ns, queue="tpu"), until=("Stopped", "QuotaReserved"))


@situation("queue-stopped", "local queue 'tpu' is stopped", fix="stopPolicy")
def local_queue_stopped(ns: str) -> list[Step]:
    return once(*queue(ns, local={"stopPolicy": "Hold"}), *job(ns, queue="tpu"), until=("Stopped", "QuotaReserved"))


@situation("not-covered", "google.com/tpu", "does not cover", fix="coveredResources", sampled=True)
def resource_not_covered(ns: str) -> list[Step]:
    return once(*queue(ns), *job(ns, queue="tpu", **tpu("v5e", "4x4")), until="unavailable in ClusterQueue")


@situation("quota-used", "cpu", "holder", fix="wait", sampled=True)
def quota_used(ns: str) -> list[Step]:
    return [
        Step(apply=(*queue(ns, cpu="50m"), *job(ns, name="holder", queue="tpu")), until=("Admitted", '"ready": 2'), job="holder"),
        Step(apply=job(ns, queue="tpu"), until=("insufficient unused quota", "positionInClusterQueue")),
    ]


@situation("over-quota", "more than", "cpu", fix="smaller")
def quota_never_enough(ns: str) -> list[Step]:
    return once(*queue(ns, cpu="10m"), *job(ns, queue="tpu"), until="maximum capacity")


@situation("flavor-mismatch", "no flavor", fix="nodeLabels")
def flavor_mismatch(ns: str) -> list[Step]:
    spec = queue(ns, flavor={"nodeLabels": {"cloud.google.com/gke-tpu-topology": "8x8"}})
    spec[1]["spec"]["resourceGroups"][0]["coveredResources"].append("google.com/tpu")
    spec[1]["spec"]["resourceGroups"][0]["flavors"][0]["resources"].append({"name": "google.com/tpu", "nominalQuota": "64"})
    return once(*spec, *job(ns, queue="tpu", **tpu("v5e", "4x4")), until="node affinity")


@situation("flavor-taint", "taint", "dedicated", fix="toleration")
def flavor_tainted(ns: str) -> list[Step]:
    taint = {"key": "dedicated", "value": "vision", "effect": "NoSchedule"}
    return once(*queue(ns, flavor={"nodeTaints": [taint]}), *job(ns, queue="tpu"), until="untolerated taint")


@situation("wrong-namespace", "namespace", "does not admit", fix="namespaceSelector")
def namespace_not_admitted(ns: str) -> list[Step]:
    return once(*queue(ns, namespaceSelector={"matchLabels": {"team": "other"}}), *job(ns, queue="tpu"), until="namespace doesn't match")


@situation("admission-check", "admission check", fix="admissioncheck")
def admission_check_missing(ns: str) -> list[Step]:
    checks = {"admissionChecks": [{"name": f"{ns}-provision"}]}
    return once(*queue(ns, admissionChecksStrategy=checks), *job(ns, queue="tpu"), until=("AdmissionCheckNotFound", "is inactive"))


@situation("admission-check", "admission check", "Pending", fix="controller")
def admission_check_pending(ns: str) -> list[Step]:
    check = {
        "apiVersion": KUEUE, "kind": "AdmissionCheck", "metadata": {"name": f"{ns}-provision"},
        "spec": {"controllerName": "nnx.test/nobody"},
    }  # fmt: skip
    checks = {"admissionChecks": [{"name": f"{ns}-provision"}]}
    active = json.dumps({"status": {"conditions": [
        {"type": "Active", "status": "True", "reason": "Active", "message": "ready", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    ]}})  # fmt: skip
    return [
        Step(apply=(check, *queue(ns, admissionChecksStrategy=checks), *job(ns, queue="tpu")), until=("QuotaReserved",)),
        Step(run=("patch", "admissioncheck", f"{ns}-provision", "--subresource=status", "--type=merge", "-p", active),
             until=("admissionChecks", "Quota reserved")),
    ]  # fmt: skip


@situation("preempted-in-queue", "urgent", "took its place", fix="priority", sampled=True)
def preempted_in_the_queue(ns: str) -> list[Step]:
    high = {"apiVersion": KUEUE, "kind": "WorkloadPriorityClass", "metadata": {"name": ns}, "value": 1000, "description": "test"}
    spec = queue(ns, cpu="50m", preemption={"withinClusterQueue": "LowerPriority"})
    urgent = job(ns, name="urgent", queue={"name": "tpu", "priority": ns})
    return [
        Step(apply=(high, *spec, *job(ns, queue="tpu")), until=('"ready": 2',)),
        Step(apply=urgent, until=("Preempted", '"suspend": true', "insufficient unused quota")),
    ]


@situation("deactivated", "taken out of the queue", fix="nnxlaunch resume train")
def workload_deactivated(ns: str) -> list[Step]:
    return [
        Step(apply=(*queue(ns, cpu="50m"), *job(ns, queue="tpu")), until=('"ready": 2',)),
        Step(call=lambda backend: backend.suspend("train"), until=("Deactivated", '"suspend": true')),
    ]


@situation("time-over", "max_run_seconds", fix="max_run_seconds")
def run_time_over(ns: str) -> list[Step]:
    return once(
        *queue(ns), *job(ns, queue={"name": "tpu", "max_run_seconds": 2}), until=("MaximumExecutionTimeExceeded", '"suspend": true')
    )


@situation("behind-others", "2", "first", fix="wait")
def behind_others(ns: str) -> list[Step]:
    return [
        Step(
            apply=(*queue(ns, cpu="150m", queueingStrategy="StrictFIFO"), *job(ns, name="holder", queue="tpu")),
            until=('"ready": 2',),
            job="holder",
        ),
        Step(
            apply=job(ns, name="first", queue="tpu", resources={"cpu": "70m", "memory": "64Mi"}),
            until=("insufficient unused quota",),
            job="first",
        ),
        Step(
            apply=job(ns, queue="tpu"),
            until=('"name": "jobset-train', '"name": "jobset-first', "positionInClusterQueue"),
        ),
    ]


@situation("no-workload", "Kueue has made no Workload", fix="kueue", namespace="kube-system")
def suspended_without_workload(ns: str) -> list[Step]:
    def hold(jobset: Manifest) -> None:
        jobset["spec"]["suspend"] = True

    return [Step(apply=job(ns, name="b-held", queue="tpu", jobset=hold), until=("Suspended",), job="b-held")]


@situation("suspended", "suspended", fix="resume")
def suspended_by_hand(ns: str) -> list[Step]:
    def hold(jobset: Manifest) -> None:
        jobset["spec"]["suspend"] = True

    return once(*job(ns, jobset=hold), until="Suspended")


# ----------------------------------------------------------- pods are refused


@situation("pod-security", "Pod Security", "privileged", fix="security", level="restricted", sampled=True)
def pod_security(ns: str) -> list[Step]:
    return once(*job(ns, security="privileged"), until="violates PodSecurity")


@situation("webhook-down", "webhook 'pods.nnx.test'", fix="admission")
def webhook_down(ns: str) -> list[Step]:
    hook = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": ns},
        "webhooks": [
            {
                "name": "pods.nnx.test",
                "clientConfig": {"url": "https://127.0.0.1:9/"},
                "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}],
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": ns}},
                "failurePolicy": "Fail",
                "sideEffects": "None",
                "admissionReviewVersions": ["v1"],
                "timeoutSeconds": 2,
            }
        ],
    }
    return once(hook, *job(ns), until="failed calling webhook")


@situation("namespace-quota", "quota", "pods", fix="quota", sampled=True)
def namespace_quota(ns: str) -> list[Step]:
    limit = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "small", "namespace": ns}, "spec": {"hard": {"pods": "0"}}}
    return once(limit, *job(ns), until="exceeded quota")


@situation("pod-limits", "memory", fix="limitrange")
def namespace_limits(ns: str) -> list[Step]:
    limit = {
        "apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "small", "namespace": ns},
        "spec": {"limits": [{"type": "Container", "max": {"memory": "16Mi"}}]},
    }  # fmt: skip
    return once(limit, *job(ns), until="maximum memory usage")


@situation("no-priority-class", "priority class 'nobody-made-it' does not exist", fix="priorityclasses")
def priority_class_missing(ns: str) -> list[Step]:
    return once(*job(ns, priority="nobody-made-it"), until="no PriorityClass")


@situation("no-service-account", "service account 'nobody-made-it' does not exist", fix="serviceaccount")
def service_account_missing(ns: str) -> list[Step]:
    return once(*job(ns, service_account="nobody-made-it"), until='nobody-made-it\\" not found')


# ------------------------------------------------------- pods find no place


@situation("no-node", "4x4x4", "tpu-v4-podslice", fix="nnxlaunch types", sampled=True)
def topology_without_nodes(ns: str) -> list[Step]:
    return once(*job(ns, **tpu("v4", "4x4x4")), until=("Unschedulable", "nodes are available"))


@situation("taint", "team=vision:NoSchedule", fix="toleration")
def nodes_tainted(ns: str) -> list[Step]:
    taint = {"key": "team", "value": "vision", "effect": "NoSchedule"}
    return once(
        *nodes(ns, "tpu-v4-podslice", "2x2x2", 2, taints=(taint,)),
        *job(ns, **tpu("v4", "2x2x2")),
        until=("untolerated taint", "Unschedulable"),
    )


@situation("chips-used", "google.com/tpu", "holder", fix="wait")
def chips_used(ns: str) -> list[Step]:
    return [
        Step(
            apply=(*nodes(ns, "tpu-v4-podslice", "2x2x4", 4), *job(ns, name="holder", **tpu("v4", "2x2x4"))),
            until=('"ready": 4',),
            job="holder",
        ),
        Step(apply=job(ns, **tpu("v4", "2x2x4")), until=("Insufficient google.com/tpu", "Unschedulable")),
    ]


@situation("too-big", "cpu", "no node", fix="resources")
def more_cpu_than_any_node(ns: str) -> list[Step]:
    return once(
        *nodes(ns, "tpu-v4-podslice", "2x4x4", 8),
        *job(ns, **tpu("v4", "2x4x4", resources={"cpu": "500", "memory": "64Mi"})),
        until="Insufficient cpu",
    )


@situation("cordoned", "cordoned", fix="uncordon")
def nodes_cordoned(ns: str) -> list[Step]:
    return [
        Step(apply=nodes(ns, "tpu-v5p-slice", "2x2x2", 2), run=("cordon", "-l", f"nnx.test/situation={ns}"), until=()),
        Step(apply=job(ns, **tpu("v5p", "2x2x2")), until=("Unschedulable", "nodes are available")),
    ]


@situation("node-not-ready", "not ready", fix="kubectl describe node")
def nodes_not_ready(ns: str) -> list[Step]:
    pool = ("-l", f"nnx.test/situation={ns}")
    return [
        Step(
            apply=nodes(ns, "tpu-v5p-slice", "2x2x4", 4),
            run=("annotate", "node", *pool, "fake.test/not-ready=KubeletStopped"),
            until=(),
        ),
        Step(run=("wait", "--for=condition=Ready=False", "node", *pool, "--timeout=60s"), until=()),
        Step(apply=job(ns, **tpu("v5p", "2x2x4")), until=("Unschedulable", "nodes are available")),
    ]


@situation("no-free-pool", "pool", "slice", fix="pool")
def exclusive_pool_taken(ns: str) -> list[Step]:
    spec = tpu("v6e", "4x4", placement={"type": "exclusive"})
    spec["tpu"]["slices"] = 2
    return once(*nodes(ns, "tpu-v6e-slice", "4x4", 4), *job(ns, **spec), until=("affinity", "Unschedulable", "nodes are available"))


@situation("no-node", "4x4x16", fix="nnxlaunch types")
def followers_wait_for_their_leader(ns: str) -> list[Step]:
    return once(*job(ns, **tpu("v4", "4x4x16", placement={"type": "exclusive"})), until=("Unschedulable", "follower"))


@situation("no-claim", "claim 'shared' does not exist", fix="persistentvolumeclaim")
def claim_missing(ns: str) -> list[Step]:
    claim = {"type": "pvc", "claim": "shared", "mount_path": "/shared"}
    return once(*job(ns, volumes=[claim]), until="not found")


@situation("claim-unbound", "claim 'shared'", "bound", fix="storage")
def claim_unbound(ns: str) -> list[Step]:
    claim = {"type": "pvc", "claim": "shared", "mount_path": "/shared"}
    wanted = {
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "shared", "namespace": ns},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}, "storageClassName": "none"},
    }  # fmt: skip
    return once(wanted, *job(ns, volumes=[claim]), until="unbound immediate PersistentVolumeClaims")


@situation("no-scheduler", "scheduler 'nobody'", fix="scheduler")
def scheduler_missing(ns: str) -> list[Step]:
    return once(*job(ns, scheduler="nobody"), until='"phase": "Pending"')


@situation("gated", "gate", "nnx.test/hold", fix="gate")
def scheduling_gate(ns: str) -> list[Step]:
    def hold(pod: Manifest) -> None:
        pod["schedulingGates"] = [{"name": "nnx.test/hold"}]

    return once(*job(ns, pod=hold), until="SchedulingGated")


# ------------------------------------------------------- containers do not start


@situation("image", "registry.invalid/team/trainer:v1", "cannot be pulled", fix="image", sampled=True)
def image_cannot_be_pulled(ns: str) -> list[Step]:
    return once(*job(ns, image=ABSENT_IMAGE), until="ErrImagePull")


@situation("image", "nnxlaunch-trainer:never-loaded", "not on the node", fix="load")
def image_not_on_the_node(ns: str) -> list[Step]:
    image = {"reference": "nnxlaunch-trainer:never-loaded", "pull_policy": "never"}
    return once(*job(ns, image=image), until="ErrImageNeverPull")


@situation("pull-secret", "registry-key", "does not exist", fix="secret")
def pull_secret_missing(ns: str) -> list[Step]:
    image = {"reference": ABSENT_IMAGE, "pull_secrets": ["registry-key"]}
    return once(*job(ns, image=image), until=("FailedToRetrieveImagePullSecret", "ErrImagePull"))


@situation("image-name", "Team/Trainer", fix="image")
def image_name_invalid(ns: str) -> list[Step]:
    return once(*job(ns, pod=container(lambda c: c.update(image="Team/Trainer:v1"))), until="InvalidImageName")


@situation("no-secret", "secret 'keys'", "does not exist", fix="kubectl create secret", sampled=True)
def secret_missing(ns: str) -> list[Step]:
    return once(*job(ns, env={"API": {"secretKeyRef": {"name": "keys", "key": "api"}}}), until="CreateContainerConfigError")


@situation("no-secret", "key 'api'", "'keys'", fix="secret")
def secret_key_missing(ns: str) -> list[Step]:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys", "namespace": ns}, "stringData": {"other": "text"}}
    return once(secret, *job(ns, env={"API": {"secretKeyRef": {"name": "keys", "key": "api"}}}), until="CreateContainerConfigError")


@situation("no-volume", "config map 'train-train'", "does not exist", fix="submit")
def config_map_missing(ns: str) -> list[Step]:
    return once(*(m for m in job(ns) if m["kind"] != "ConfigMap"), until="FailedMount")


@situation("runs-as-root", "root", fix="security")
def image_runs_as_root(ns: str) -> list[Step]:
    def no_user(pod: Manifest) -> None:
        pod["securityContext"] = {"runAsNonRoot": True}

    return once(*job(ns, pod=no_user), until="CreateContainerConfigError")


@situation("command", "no-such-program", fix="image")
def command_missing(ns: str) -> list[Step]:
    return once(*job(ns, pod=container(lambda c: c.update(command=["no-such-program"]))), until=("StartError", '"Failed"', "FailJobSet"))


# ------------------------------------------------------- it ran and ended


@situation("fatal-exit", "64", "slice 0, worker 1", fix="logs", sampled=True)
def bad_config(ns: str) -> list[Step]:
    return once(*job(ns, ends("sys.exit(64)")), until=("FailJobSet", '"terminalState": "Failed"'))


@situation("fatal-exit", "77", "NaN", fix="logs")
def numerics(ns: str) -> list[Step]:
    return once(*job(ns, ends("sys.exit(77)")), until=('"terminalState": "Failed"',))


@situation("out-of-memory", "memory", "budget", fix="memory")
def out_of_memory(ns: str) -> list[Step]:
    program = ends("blob = bytearray(b'x') * (512 << 20); print(len(blob))")
    return once(*job(ns, program, failure={"max_restarts": 0}), until=("OOMKilled", '"terminalState": "Failed"'))


@situation("budget-used", "134", "1 counted restart", fix="max_restarts")
def budget_used(ns: str) -> list[Step]:
    return once(*job(ns, ends("sys.exit(134)"), failure={"max_restarts": 1}), until=("ReachedMaxRestarts", '"terminalState": "Failed"'))


@situation("restarting", "leave", fix="grace")
def restart_waits_for_grace(ns: str) -> list[Step]:
    program = ends("sys.exit(134)").replace(
        "signal.sigtimedwait([signal.SIGTERM], 60)", "import time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    )
    return once(*job(ns, program, grace_seconds=60, failure={"max_restarts": 3}), until=("deletionTimestamp",))


@situation("crash-loop", "134", "restarted", fix="--previous")
def crash_loop(ns: str) -> list[Step]:
    return once(*job(ns, ends("sys.exit(134)"), failure={"max_restarts": 40}), until=('"restarts": 3', '"exitCode": 134'))


@situation("free-restarts", "75", "free", fix="--previous")
def preempted_again_and_again(ns: str) -> list[Step]:
    return once(*job(ns, ends("sys.exit(75)")), until=('"restarts": 4',))


@situation("evicted", "EmptyDir", "tmp", "1Mi", fix="tmp")
def evicted_for_its_disk(ns: str) -> list[Step]:
    def small(pod: Manifest) -> None:
        for volume in pod["volumes"]:
            if "emptyDir" in volume and volume["name"] == "tmp":
                volume["emptyDir"] = {"sizeLimit": "1Mi"}

    program = "import signal\nopen('/tmp/big', 'wb').write(bytes(8 << 20))\nsignal.sigwait([signal.SIGTERM])"
    return once(*job(ns, program, pod=small), until=("Evicted", '"restarts": 1'))


@situation("preempted", "higher priority", "slice 0, worker 0", fix="priority")
def preempted_by_the_scheduler(ns: str) -> list[Step]:
    high = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": ns}, "value": 1000}
    pool = nodes(ns, "tpu-v4-podslice", "2x2x1", 1)
    return [
        Step(apply=(high, *pool, *job(ns, **tpu("v4", "2x2x1"))), until=('"ready": 1',)),
        Step(apply=job(ns, name="urgent", priority=ns, **tpu("v4", "2x2x1")), until=("PreemptionByScheduler", "deletionTimestamp")),
    ]


def evict(backend: KubernetesBackend) -> None:
    """As a drain does, of one pod."""
    pod = backend.get("train").pods[1].name
    wish = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": backend.namespace}}
    kubectl("create", "--raw", f"/api/v1/namespaces/{backend.namespace}/pods/{pod}/eviction", "-f", "-", stdin=json.dumps(wish))


@situation("running", "2 of 2", "slice 0, worker 1", "eviction", fix="nothing")
def drained(ns: str) -> list[Step]:
    return [
        Step(apply=job(ns, f"{SLEEP}; raise SystemExit(143)"), until=('"ready": 2',)),
        Step(call=evict, until=('"restarts": 1', '"ready": 2')),
    ]


@situation("leaving", "leave", "grace", fix="wait")
def cancelled_but_deaf(ns: str) -> list[Step]:
    return [
        Step(apply=job(ns, DEAF, grace_seconds=40), until=('"ready": 2',)),
        Step(run=("delete", "jobset", "train", "-n", ns, "--cascade=foreground", "--wait=false"), until=("deletionTimestamp",)),
    ]


@situation("running", "2 of 2", fix="nothing", sampled=True)
def running(ns: str) -> list[Step]:
    return once(*job(ns), until='"ready": 2')


@situation("completed", "done", fix="nothing")
def completed(ns: str) -> list[Step]:
    return once(*job(ns, "print('done')"), until='"terminalState": "Completed"')
