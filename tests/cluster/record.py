"""Make the situations on the cluster of $KUBECONFIG and keep what the launcher reads of each.

`python -m tests.cluster.record [NAME...]`
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launcher.backend.kubernetes import KubernetesBackend
from launcher.backend.scene import Scene
from launcher.errors import NotFound
from tests.cluster.situations import SITUATIONS, Situation, Step
from tests.cluster.tools import PATIENCE_SECONDS, kubectl

TARGET = Path(__file__).parents[1] / "launcher" / "situations"
LOOK_SECONDS = 0.5


def make(situation: Situation, ns: str) -> tuple[KubernetesBackend, str]:
    """Go through the steps; returns when the situation is there, with where to look and the job's name."""
    if not situation.namespace:
        labels = {"pod-security.kubernetes.io/enforce": situation.level, "nnx.test/situation": "true"}
        kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": ns, "labels": labels}}))
    backend, job = KubernetesBackend(namespace=ns), ""
    for step in situation.steps(ns):
        if step.apply:
            kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(step.apply)}))
        if step.run:
            kubectl(*step.run)
        if step.call:
            step.call(backend)
        if step.until:
            await_words(backend, step)
            job = step.job
    return backend, job


def await_words(backend: KubernetesBackend, step: Step) -> Scene:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            scene = backend.scene(step.job)
            text = json.dumps(scene.as_data())
        except NotFound:
            text = ""
        missing = [words for words in step.until if words not in text]
        if not missing:
            return scene
        if time.monotonic() > deadline:
            raise TimeoutError(f"{step.job} in {backend.namespace}: never seen: {missing}; seen: {text}")
        time.sleep(LOOK_SECONDS)


def clear(situation: Situation, ns: str) -> None:
    """Everything of the situation; jobs go at once, whatever their grace period."""
    everywhere = [
        f"{thing['kind']}/{thing['metadata']['name']}"
        for step in situation.steps(ns)
        for thing in step.apply
        if thing["kind"] in ("Node", "ClusterQueue", "ResourceFlavor", "AdmissionCheck", "WorkloadPriorityClass", "PriorityClass")
        or thing["kind"].endswith("WebhookConfiguration")
    ]
    kubectl("delete", "jobset", "--all", "-n", ns, "--wait=false") if not situation.namespace else kubectl(
        "delete", "jobset", "b-held", "-n", ns, "--ignore-not-found", "--wait=false"
    )
    if everywhere:
        kubectl("delete", "--ignore-not-found", "--wait=false", *everywhere)
    if not situation.namespace:
        kubectl("delete", "pods", "--all", "-n", ns, "--grace-period=0", "--force")
        kubectl("delete", "namespace", ns, "--wait=false")


def record(situation: Situation) -> str:
    ns = situation.namespace or f"b-{situation.name}"
    began = time.monotonic()
    try:
        backend, job = make(situation, ns)
        scene = backend.scene(job)
        TARGET.joinpath(f"{situation.name}.json").write_text(json.dumps(scene.as_data(), indent=1, ensure_ascii=False) + "\n")
        return f"{situation.name}: {time.monotonic() - began:.0f} s"
    except Exception as error:
        return f"{situation.name}: FAILED {str(error)[:1500]} {getattr(error, 'stderr', '')}"
    finally:
        clear(situation, ns)


def main() -> None:
    chosen = [situation for situation in SITUATIONS if not sys.argv[1:] or situation.name in sys.argv[1:]]
    with ThreadPoolExecutor(6) as pool:
        for line in pool.map(record, chosen):
            print(line, flush=True)


if __name__ == "__main__":
    main()
