"""A namespace of a real cluster with JobSet and Kueue; `.ci/run` starts one and says where it is.

Needs `KUBECONFIG` (an administrator), `STORAGE_EMULATOR_HOST` (an object store that pods and this machine reach by one
address) and `TEST_IMAGE` (loaded into the node). Not collected by `make test`.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Generator

import pytest

from launcher.backend.kubernetes import KubernetesBackend
from tests.cluster.tools import kubectl


@pytest.fixture(scope="session")
def namespace() -> Generator[str]:
    """A namespace that enforces the restricted Pod Security level."""
    missing = [name for name in ("KUBECONFIG", "STORAGE_EMULATOR_HOST", "TEST_IMAGE") if not os.environ.get(name)]
    if missing:
        pytest.fail(f"the cluster tests need {', '.join(missing)}; run .ci/run, or see the head of {__file__}")
    name = f"nnx-{uuid.uuid4().hex[:8]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    kubectl("create", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}))
    yield name
    kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def backend(namespace: str) -> KubernetesBackend:
    return KubernetesBackend(namespace=namespace)


@pytest.fixture(scope="session")
def storage() -> dict[str, str]:
    """Variables that send every gs:// client, here and in pods, to the cluster's object store."""
    host = os.environ["STORAGE_EMULATOR_HOST"]
    return {"STORAGE_EMULATOR_HOST": host, "TENSORSTORE_GCS_HTTP_URL": host, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


@pytest.fixture(scope="session")
def image() -> str:
    return os.environ["TEST_IMAGE"]


@pytest.fixture(autouse=True)
def scene(request: pytest.FixtureRequest) -> Generator[None]:
    """When a test has failed, what its namespace looks like goes into the report."""
    failed_before = request.session.testsfailed
    yield
    if request.session.testsfailed > failed_before and "namespace" in request.fixturenames:
        print(kubectl("-n", request.getfixturevalue("namespace"), "get", "jobsets,jobs,pods,events", "-o", "wide"))
