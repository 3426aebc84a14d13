"""What a person sees who may not, cannot, or may: the real server's refusals as one sentence, and the published role."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.backend import JobState
from launcher.backend.kubernetes import KubernetesBackend
from tests.cluster.test_queue import queue
from tests.cluster.tools import PATIENCE_SECONDS, cheap_job, document, kubectl, nnxlaunch

__all__ = ["queue"]
ROLE = Path(__file__).parents[2] / "k8s" / "cluster" / "role.yaml"
Login = Callable[..., str]


@pytest.fixture
def login(tmp_path: Path, namespace: str) -> Login:
    """Writes a kubeconfig for this cluster with another user; gives its path."""
    admin = json.loads(kubectl("config", "view", "--raw", "--minify", "-o", "json"))

    def write(user: dict[str, Any], **cluster: Any) -> str:
        admin["users"][0]["user"] = user
        admin["contexts"][0]["context"]["namespace"] = namespace
        admin["clusters"][0]["cluster"] |= cluster
        path = tmp_path / "kubeconfig"
        path.write_text(yaml.safe_dump(admin))
        return str(path)

    return write


@pytest.fixture(scope="module")
def account(namespace: str) -> str:
    """A user without any rights."""
    kubectl("-n", namespace, "create", "serviceaccount", "somebody")
    return kubectl("-n", namespace, "create", "token", "somebody").strip()


def refused(words: list[str], code: int = 69) -> str:
    """Standard error of a command that fails: an error line and perhaps a hint, nothing else."""
    done = nnxlaunch(*words)
    lines = done.stderr.splitlines()
    assert done.returncode == code, done.stderr
    assert [line.partition(":")[0] for line in lines] in (["error"], ["error", "hint"]), done.stderr
    return done.stderr


def test_a_user_without_rights_is_told_which_one_is_missing(login: Login, account: str, tmp_path: Path) -> None:
    kubeconfig = login({"token": account})
    spec = tmp_path / "job.yaml"
    spec.write_text(yaml.safe_dump(document("refused")))
    assert "is not allowed to create" in refused(["submit", str(spec), "--kubeconfig", kubeconfig])
    assert "is not allowed to list jobsets" in refused(["list", "--kubeconfig", kubeconfig])


def test_credentials_that_the_server_does_not_take_ask_for_a_new_login(login: Login) -> None:
    assert "log in again" in refused(["list", "--kubeconfig", login({"token": "expired"})])


def test_a_missing_credential_plugin_is_named(login: Login) -> None:
    user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "no-such-plugin"}}
    assert "'no-such-plugin', which is not installed" in refused(["list", "--kubeconfig", login(user)])


def test_a_server_that_is_not_there_is_told_from_one_that_refuses(login: Login, account: str) -> None:
    kubeconfig = login({"token": account}, server="https://127.0.0.1:1")
    assert "cannot be reached: Connection refused" in refused(["list", "--kubeconfig", kubeconfig])


def test_a_missing_namespace_is_named_with_the_way_to_make_it(tmp_path: Path) -> None:
    spec = tmp_path / "job.yaml"
    spec.write_text(yaml.safe_dump(document("nowhere")))
    assert "kubectl create namespace no-such-namespace" in refused(["submit", str(spec), "-n", "no-such-namespace"])


def test_the_published_role_is_enough_for_every_verb(login: Login, account: str, namespace: str, queue: str) -> None:
    kubectl("-n", namespace, "apply", "-f", str(ROLE))
    kubectl("-n", namespace, "create", "rolebinding", "somebody", "--role=nnxlaunch", f"--serviceaccount={namespace}:somebody")
    backend = KubernetesBackend(kubeconfig=login({"token": account}))
    assert backend.namespace == namespace
    backend.create(cheap_job("allowed", "print('hello')"))
    assert [line.text for line in backend.logs("allowed", follow=True)] == ["hello", "hello"]
    *_, status = backend.watch("allowed", timeout_seconds=PATIENCE_SECONDS)
    assert status.state is JobState.COMPLETED
    assert "AllJobsCompleted" in [event.reason for event in backend.events("allowed")]
    assert "allowed" in [job.name for job in backend.list()]
    assert backend.scene("allowed").unreadable == ()
    backend.create(cheap_job("allowed", "print('hello')", queue=queue), replace=True)  # which has no room for it
    for status in backend.watch("allowed", timeout_seconds=PATIENCE_SECONDS):
        if "insufficient" in status.message:
            break
    backend.suspend("allowed")
    active = ("get", "workloads", "-o", "jsonpath={.items[?(@.metadata.ownerReferences[0].name=='allowed')].spec.active}")
    assert kubectl("-n", namespace, *active) == "false"
    backend.resume("allowed")
    assert kubectl("-n", namespace, *active) == "true"
    assert backend.scene("allowed").local_queue is not None
    backend.delete("allowed")
