"""A namespace of a real cluster with JobSet and Kueue; `.ci/run` starts one and says where it is.

Needs `KUBECONFIG` (an administrator of a cluster whose one node is this machine) and `TEST_IMAGE` (loaded into the node).
Not collected by `make test`.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

from launcher.backend.kubernetes import KubernetesBackend
from tests.cluster.node import node_address
from tests.cluster.tools import kubectl, own_namespace
from tests.gcs_emulator import Gcs, gcs_emulator


@pytest.fixture(scope="session")
def namespace() -> Generator[str]:
    missing = [name for name in ("KUBECONFIG", "TEST_IMAGE") if not os.environ.get(name)]
    if missing:
        pytest.fail(f"the cluster tests need {', '.join(missing)}; run .ci/run, or see the head of {__file__}")
    with own_namespace() as name:
        yield name


@pytest.fixture(scope="session")
def backend(namespace: str) -> KubernetesBackend:
    return KubernetesBackend(namespace=namespace)


@pytest.fixture(scope="session")
def storage() -> Generator[Gcs]:
    """An object store on the node's own address: pods and this machine reach it by the same one."""
    with gcs_emulator(node_address()) as server:
        yield server


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
