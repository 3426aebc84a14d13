"""What a situation is, and the objects situations are made of: jobs, queues, nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from launcher.backend import Manifest
from launcher.backend.kubernetes import KubernetesBackend
from tests.cluster.tools import cheap_job

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
