"""Situations before a job has pods: in its queue, and where its pods are refused."""

from __future__ import annotations

import json

from launcher.backend import Manifest
from tests.cluster.situation import (
    KUEUE,
    Step,
    job,
    once,
    queue,
    situation,
    tpu,
)

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
