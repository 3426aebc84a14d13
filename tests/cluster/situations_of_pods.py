"""Situations of pods: no place, containers that do not start, ends."""

from __future__ import annotations

import json

from launcher.backend import Manifest
from launcher.backend.kubernetes import KubernetesBackend
from tests.cluster.situation import (
    ABSENT_IMAGE,
    DEAF,
    SLEEP,
    Step,
    container,
    ends,
    job,
    nodes,
    once,
    situation,
    tpu,
)
from tests.cluster.tools import kubectl

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
