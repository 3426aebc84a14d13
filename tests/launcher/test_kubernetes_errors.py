"""Each way the API server says no is one sentence with its fix. The answers were recorded from a 1.36 server."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
import urllib3

from launcher.backend.kubernetes_errors import NotAllowed, OverQuota, TemporarilyUnavailable, from_connection, from_status
from launcher.errors import AlreadyExists, NnxlaunchError, NotFound, Unavailable

WHERE = "cluster 'prod' (context 'me')"


def answer(code: int, message: str, reason: str, details: dict[str, Any] | None = None) -> tuple[int, str]:
    status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "reason": reason, "code": code}
    return code, json.dumps(status | ({"details": details} if details else {}))


ANSWERS: dict[str, tuple[tuple[int, str], type[NnxlaunchError], str, str]] = {
    "expired login": (answer(401, "Unauthorized", "Unauthorized"), Unavailable, "does not accept the credentials", "gcloud auth login"),
    "no right": (
        answer(
            403,
            'jobsets.jobset.x-k8s.io is forbidden: User "eve" cannot create resource "jobsets" in API group "jobset.x-k8s.io"'
            ' in the namespace "default"',
            "Forbidden",
        ),
        NotAllowed,
        "user 'eve' is not allowed to create jobsets",
        "kubectl auth can-i create jobsets",
    ),
    "no JobSet": ((404, "404 page not found\n"), Unavailable, "JobSet is not installed", "kubectl apply"),
    "no namespace": (
        answer(404, 'namespaces "team-b" not found', "NotFound", {"name": "team-b", "kind": "namespaces"}),
        Unavailable,
        "namespace 'team-b' does not exist",
        "kubectl create namespace team-b",
    ),
    "no object": (
        answer(404, 'jobsets.jobset.x-k8s.io "zzz" not found', "NotFound", {"name": "zzz", "kind": "jobsets"}),
        NotFound,
        "not found",
        "nnxlaunch list",
    ),
    "kubelet just started": (
        answer(
            404,
            "the server could not find the requested resource ( pods/log train-slice-0-0-bj25r)",
            "NotFound",
            {"name": "train-slice-0-0-bj25r", "kind": "pods/log"},
        ),
        TemporarilyUnavailable,
        "its node does not know it now",
        "try again",
    ),
    "name taken": (
        answer(409, 'jobsets.jobset.x-k8s.io "a" already exists', "AlreadyExists"),
        AlreadyExists,
        "already exists",
        "--replace",
    ),
    "old JobSet": (
        answer(
            400, 'JobSet in version "v1alpha2" cannot be handled as a JobSet: strict decoding error: unknown field "spec.foo"', "BadRequest"
        ),
        Unavailable,
        'does not know a field: unknown field "spec.foo"',
        "older than this launcher needs",
    ),
    "Pod Security": (
        answer(403, 'pods "a-0" is forbidden: violates PodSecurity "restricted:latest": host namespaces (hostNetwork=true)', "Forbidden"),
        Unavailable,
        'Pod Security level forbids it: "restricted:latest": host namespaces',
        "security: restricted",
    ),
    "quota": (
        answer(403, 'pods "a-0" is forbidden: exceeded quota: small, requested: cpu=4, used: cpu=2, limited: cpu=4', "Forbidden"),
        OverQuota,
        "exceeded quota: small",
        "quota",
    ),
    "webhook down": (
        answer(500, 'Internal error occurred: failed calling webhook "vjobset.kb.io": connection refused', "InternalError"),
        TemporarilyUnavailable,
        "does not answer",
        "controller is down",
    ),
    "busy": (answer(429, "too many requests", "TooManyRequests"), TemporarilyUnavailable, "answered 429", "try again"),
    "webhook denial": (
        answer(422, 'admission webhook "vjobset.kb.io" denied the request: JobSet name is too long', "Invalid"),
        Unavailable,
        f"vjobset.kb.io of {WHERE} denies it: JobSet name is too long",
        "JobSet or Kueue",
    ),
    "somebody's webhook": (
        answer(403, 'admission webhook "images.example.com" denied the request: only signed images', "Forbidden"),
        Unavailable,
        "images.example.com of",
        "whoever runs 'images.example.com'",
    ),
    "policy denial": (
        answer(
            422,
            "jobsets.jobset.x-k8s.io \"a\" is forbidden: ValidatingAdmissionPolicy 'cost' with binding 'all' denied request: label team",
            "Invalid",
        ),
        Unavailable,
        f"cost of {WHERE} denies it: label team",
        "whoever runs 'cost'",
    ),
    "changed meanwhile": (
        answer(409, 'Operation cannot be fulfilled on jobsets "a": the object has been modified', "Conflict"),
        Unavailable,
        "at the same time",
        "try again",
    ),
    "no priority class": (
        answer(403, 'pods "a-0" is forbidden: no PriorityClass with name urgent was found', "Forbidden"),
        Unavailable,
        "no PriorityClass 'urgent'",
        "kubectl get priorityclasses",
    ),
    "no account": (
        answer(
            403, 'pods "a-0" is forbidden: error looking up service account ns/trainer: serviceaccount "trainer" not found', "Forbidden"
        ),
        Unavailable,
        "no service account 'trainer' in namespace 'ns'",
        "kubectl -n ns create serviceaccount trainer",
    ),
    "limit range": (
        answer(403, 'pods "a-0" is forbidden: maximum memory usage per Container is 1Gi, but limit is 4Gi', "Forbidden"),
        Unavailable,
        "a LimitRange of the namespace forbids it: maximum memory usage",
        "`resources`",
    ),
    "namespace goes": (
        answer(403, 'jobsets "a" is forbidden: unable to create new content in namespace x because it is being terminated', "Forbidden"),
        Unavailable,
        "the namespace is being deleted",
        "-n NAMESPACE",
    ),
    "a proxy's page": ((403, "<html>Forbidden</html>"), Unavailable, "refused it: HTTP 403", ""),
}


@pytest.mark.parametrize(("reply", "kind", "sentence", "hint"), ANSWERS.values(), ids=ANSWERS.keys())
def test_an_answer_becomes_one_sentence_with_the_fix(reply: tuple[int, str], kind: type[NnxlaunchError], sentence: str, hint: str) -> None:
    error = from_status(*reply, doing="create JobSet 'a'", where=WHERE)
    assert type(error) is kind
    assert str(error).startswith("cannot create JobSet 'a': ")
    assert sentence in str(error)
    assert hint in error.hint
    assert "\n" not in str(error)


def test_a_port_nobody_listens_on_can_be_tried_again() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(urllib3.exceptions.HTTPError) as caught, urllib3.PoolManager() as pool:
        pool.request("GET", f"https://127.0.0.1:{port}/", retries=False)
    error = from_connection(caught.value, doing="list jobsets", where=WHERE)
    assert type(error) is TemporarilyUnavailable
    assert str(error) == f"cannot list jobsets: {WHERE} cannot be reached: Connection refused"


def test_a_name_that_does_not_resolve_points_at_network_and_context() -> None:
    with pytest.raises(urllib3.exceptions.HTTPError) as caught, urllib3.PoolManager() as pool:
        pool.request("GET", "https://no-such-host.invalid/", retries=False)
    error = from_connection(caught.value, doing="list jobsets", where=WHERE)
    assert str(error) == f"cannot list jobsets: the address of {WHERE} does not resolve"
    assert "--context" in error.hint
