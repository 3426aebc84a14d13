"""The API server, with the webhooks of JobSet and Kueue, takes what the launcher renders and refuses what its checks refuse."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings

from launcher.backend import Manifest
from launcher.backend.kubernetes import KubernetesBackend
from launcher.backend.kubernetes_api import SERVICE_ACCOUNT, Api
from launcher.backend.kubernetes_login import log_in
from launcher.checks import load, problems_of_document
from launcher.errors import AlreadyExists, NnxlaunchError, Unavailable
from launcher.manifest import render
from launcher.spec import JobSpec, from_document, from_yaml
from tests.cluster.tools import document, kubectl
from tests.launcher.regenerate import EXAMPLES
from tests.launcher.strategies import Document, documents
from tests.launcher.test_server_rules import BROKEN, restored

MANY = settings(
    max_examples=60 if os.environ.get("CI") else 10,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
# Nothing refuses these when a job is made: JobSet meets a broken pattern when a Job fails, Kueue and GKE look when the
# job is admitted, and an empty list of pod conditions never matches. The launcher's own check is the only one.
SILENT = {11, 18, 23, 25}


@pytest.fixture(scope="module")
def open_namespace(namespace: str) -> Generator[KubernetesBackend]:
    """Another one, where any pod may run."""
    name = f"{namespace}-open"
    kubectl("create", "namespace", name)
    yield KubernetesBackend(namespace=name)
    kubectl("delete", "namespace", name, "--wait=false")


def must_be_accepted(spec: JobSpec, restricted: KubernetesBackend, open_to_all: KubernetesBackend) -> None:
    """A namespace of the restricted Pod Security level takes it, unless the spec itself asks for more than that."""
    manifests = render(spec)
    if spec.service_account is not None:
        api = Api(log_in(context=None, kubeconfig=None))
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": spec.service_account}}
        for backend in (restricted, open_to_all):
            with suppress(AlreadyExists):
                api.create(SERVICE_ACCOUNT, backend.namespace, account)
    open_to_all.check(manifests)
    if spec.security == "restricted":
        restricted.check(manifests)
    else:
        with pytest.raises(Unavailable, match="Pod Security"):
            restricted.check(manifests)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.job.yaml")), ids=lambda path: path.name)
def test_every_example_is_accepted(backend: KubernetesBackend, open_namespace: KubernetesBackend, path: Path) -> None:
    must_be_accepted(from_yaml(path), backend, open_namespace)


@MANY
@given(drawn=documents())
def test_every_valid_spec_is_accepted(backend: KubernetesBackend, open_namespace: KubernetesBackend, drawn: Document) -> None:
    spec = from_document(drawn)
    assume(spec.priority is None)  # the class would have to exist
    must_be_accepted(spec, backend, open_namespace)


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a document but those of the trainer, which the server never looks into."""
    if path and path[0] == "train":
        return
    yield path
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in entries:
        yield from leaves(value, (*path, key))


HOSTILE: tuple[Any, ...] = (
    "", " ", "a", "A", "-a", "a-", "a.b", "a_b", "a/b", "a b", "a\nb: c", "{a: b}", "$(id)", "../a", "/a/../b", "/", "/a:b",
    "a" * 63, "a" * 64, "a" * 254, "é", "\u202e", "💥", "y", "null", "1", "1e3", "0x1f", "1Gi", "-1Gi", "0", "1.5.2", "gs://a",
    "@sha256:0", "kueue.x-k8s.io/x", 0, 1, -1, 63, 65_536, 2**31 - 1, 2**31, 2**63, 10**30, 0.5, True, False, None,
    [], {}, ["a"], ["a", "a"], {"a": "b"}, {"a/b/c": "d"}, {"": ""},
)  # fmt: skip
EXTRAS: Document = {
    "service_account": None,  # it would have to exist, and only the server knows whether it does
    "labels": {"team": "a"},
    "annotations": {"note": "b"},
    "env": {"MODE": "c", "TOKEN": {"secretKeyRef": {"name": "n", "key": "k"}}},
}


def mutated_documents(count: int) -> Iterator[Document]:
    """The examples in full, each with one to three values replaced; the same ones every time."""
    random = Random(0)
    bases = [json.loads(load(path).model_dump_json()) for path in sorted(EXAMPLES.glob("*.job.yaml")) if "quickstart" not in path.name]
    for _ in range(count):
        chosen = {**copy.deepcopy(random.choice(bases)), **copy.deepcopy(EXTRAS)}
        chosen["volumes"] = [*chosen["volumes"], {"type": "memory", "mount_path": "/scratch", "size_gib": 1}]
        for _ in range(random.randint(1, 3)):
            *above, last = random.choice([path for path in leaves(chosen) if path])
            node: Any = chosen
            for key in above:
                node = node[key]
            node[last] = copy.deepcopy(random.choice(HOSTILE))  # the next may land inside of it
        yield chosen


def test_of_a_thousand_mutated_specs_the_server_refuses_none_that_validate_takes(open_namespace: KubernetesBackend) -> None:
    refused: list[str] = []
    taken = 0
    for document_ in mutated_documents(1000):
        spec, problems = problems_of_document(document_, target="kubernetes")
        if spec is None or problems or spec.priority is not None or spec.service_account is not None:
            continue  # a class and an account would have to exist: only the server knows
        taken += 1
        try:
            open_namespace.check(render(spec))
        except NnxlaunchError as error:
            refused.append(str(error))
    assert not refused, "\n".join(refused)
    assert taken >= 20, "the mutations leave something to try"


@pytest.mark.parametrize("name", ["namespace", "role", "view", "queue"])
def test_what_an_administrator_applies_is_accepted(namespace: str, name: str) -> None:
    text = (EXAMPLES.parent / "cluster" / f"{name}.yaml").read_text().replace("namespace: train", f"namespace: {namespace}")
    kubectl("-n", namespace, "apply", "--dry-run=server", "-f", "-", stdin=text)


def test_what_the_launchers_own_rules_refuse_the_server_refuses(backend: KubernetesBackend) -> None:
    rendered: Manifest = render(load(EXAMPLES / "v5p-128-spot.job.yaml", ["queue=q", "placement=tas"]))[-1]
    accepted: set[int] = set()
    for rule, mutate in BROKEN:
        try:
            backend.check([restored(mutate, rendered)])
        except NnxlaunchError:
            continue
        accepted.add(rule)
    assert accepted <= SILENT


def test_an_unknown_field_and_a_missing_priority_class_are_found_before_anything_is_created(
    backend: KubernetesBackend, namespace: str
) -> None:
    manifests = render(from_document(document("typo")))
    manifests[-1]["spec"]["replicatdJobs"] = []
    with pytest.raises(Unavailable, match=r"spec\.replicatdJobs needs another JobSet; .* serves JobSet 0\.12"):
        backend.create(manifests)
    with pytest.raises(Unavailable, match="no PriorityClass 'nobody-made-it'"):
        backend.create(render(from_document(document("typo", priority="nobody-made-it"))))
    assert "typo" not in kubectl("-n", namespace, "get", "jobsets,configmaps,serviceaccounts,networkpolicies", "-o", "name")
