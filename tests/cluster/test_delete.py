"""A job that is deleted leaves nothing behind."""

from __future__ import annotations

from launcher.backend import JobState
from launcher.backend.kubernetes import KubernetesBackend
from tests.cluster.tools import PATIENCE_SECONDS, cheap_job, kubectl


def test_a_job_is_deleted_with_everything_that_was_made_for_it(backend: KubernetesBackend, namespace: str) -> None:
    name = "gone"
    backend.create(cheap_job(name, "import signal; signal.sigwait([signal.SIGTERM])"))
    for status in backend.watch(name, timeout_seconds=PATIENCE_SECONDS):
        if status.state is JobState.RUNNING:
            break
    owned = ("configmap/gone-train", "serviceaccount/gone", "networkpolicy/gone")
    for thing in owned:
        assert kubectl("-n", namespace, "get", thing, "-o", "jsonpath={.metadata.ownerReferences[0].kind}") == "JobSet"
    backend.delete(name)
    left = kubectl("-n", namespace, "get", "jobsets,jobs,pods,configmaps,serviceaccounts,networkpolicies,services", "-o", "name").split()
    assert not [thing for thing in left if "/gone" in thing]
