"""A tag becomes a digest: asked of a registry over HTTP that wants a token, with Docker's credentials, or not at all."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from launcher.checks import load, problems_in
from launcher.errors import Unavailable
from launcher.image import Reference
from launcher.manifest import render
from launcher.pinning import pinned_if_told
from launcher.registry import resolved
from tests.launcher.regenerate import EXAMPLES

DIGEST = "sha256:" + "5" * 64
LOGIN = base64.b64encode(b"me:secret").decode()


class Handler(BaseHTTPRequestHandler):
    """`open` for everybody; `team` for a token of the service, which wants a login; `basic` for a login; nothing else is there."""

    def do_GET(self) -> None:
        allowed = self.headers.get("Authorization") == f"Basic {LOGIN}"
        if "scope=repository%3Ateam%2Ftrainer%3Apull" not in self.path or "service=here" not in self.path:
            return self._answer(400)
        return self._answer(200, json.dumps({"token": "t"}).encode()) if allowed else self._answer(401)

    def do_HEAD(self) -> None:
        host, asked = self.headers["Host"], self.headers.get("Authorization")
        assert "application/vnd.oci.image.index.v1+json" in self.headers["Accept"]
        if self.path in ("/v2/open/trainer/manifests/1", "/v2/open/trainer/manifests/latest"):
            return self._answer(200, digest=DIGEST)
        if self.path == "/v2/team/trainer/manifests/1":
            scheme = f'Bearer realm="http://{host}/token",service="here",scope="repository:team/trainer:pull"'
            return self._answer(200, digest=DIGEST) if asked == "Bearer t" else self._answer(401, challenge=scheme)
        if self.path == "/v2/basic/trainer/manifests/1":
            return self._answer(200, digest=DIGEST) if asked == f"Basic {LOGIN}" else self._answer(401, challenge='Basic realm="x"')
        if self.path == "/v2/mute/trainer/manifests/1":
            return self._answer(200)
        return self._answer(404)

    def _answer(self, status: int, body: bytes = b"", *, digest: str = "", challenge: str = "") -> None:
        self.send_response(status)
        for name, value in (("Docker-Content-Digest", digest), ("WWW-Authenticate", challenge)):
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def host() -> Generator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def docker_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nobody is logged in."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    return tmp_path / "config.json"


def test_a_tag_of_an_open_registry_becomes_its_digest_and_keeps_the_tag(host: str) -> None:
    assert str(resolved(Reference.parse(f"{host}/open/trainer:1"))) == f"{host}/open/trainer:1@{DIGEST}"
    assert str(resolved(Reference.parse(f"{host}/open/trainer"))) == f"{host}/open/trainer@{DIGEST}"


@pytest.mark.parametrize("repository", ["team", "basic"])
def test_the_credentials_that_docker_keeps_or_its_helper_gives_are_used(
    host: str, repository: str, docker_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = Reference.parse(f"{host}/{repository}/trainer:1")
    with pytest.raises(Unavailable, match=r"the registry wants a login \(401\)"):
        resolved(reference)
    docker_config.write_text(json.dumps({"auths": {host: {"auth": LOGIN}}}))
    assert resolved(reference).digest == DIGEST
    helper = docker_config.with_name("docker-credential-mine")
    answer = json.dumps({"Username": "me", "Secret": "secret"})
    helper.write_text(f"#!/bin/sh\nread host\n[ \"$1 $host\" = 'get {host}' ] && echo '{answer}'\n")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{helper.parent}:/usr/bin:/bin")
    docker_config.write_text(json.dumps({"credHelpers": {host: "mine"}}))
    assert resolved(reference).digest == DIGEST


def test_a_registry_that_does_not_tell_is_named_with_what_to_do(host: str) -> None:
    for name, words in {
        f"{host}/gone/trainer:1": "there is no such image (404)",
        f"{host}/mute/trainer:1": "does not tell digests",
        "127.0.0.1:1/team/trainer:1": "127.0.0.1:1 cannot be reached",
    }.items():
        with pytest.raises(Unavailable) as caught:
            resolved(Reference.parse(name))
        assert words in str(caught.value) and caught.value.hint


def pod_image(manifests: list[dict[str, Any]]) -> tuple[str, str]:
    (container,) = manifests[-1]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    return container["image"], container["imagePullPolicy"]


def test_the_policy_decides_whether_a_job_goes_on_without_a_digest(host: str) -> None:
    def submitted(reference: str, policy: str) -> tuple[tuple[str, str], str]:
        spec = load(EXAMPLES / "v5e-16.job.yaml", [f"image={{reference: '{reference}', digest_policy: {policy}}}"])
        manifests, trouble = pinned_if_told(spec, before := render(spec))
        assert before == render(spec), "what was rendered is left as it is"
        return pod_image(manifests), trouble

    there, gone = f"{host}/open/trainer:1", f"{host}/gone/trainer:1"
    for policy in ("when_possible", "require_digest"):
        assert submitted(there, policy) == ((f"{there}@{DIGEST}", "IfNotPresent"), "")
        assert submitted(f"{gone}@{DIGEST}", policy) == ((f"{gone}@{DIGEST}", "IfNotPresent"), "")
    assert submitted(there, "as_given") == ((there, "Always"), "")
    kept, trouble = submitted(gone, "when_possible")
    assert kept == (gone, "Always") and "there is no such image" in trouble
    with pytest.raises(Unavailable, match="the spec requires its digest"):
        submitted(gone, "require_digest")


def test_an_image_of_this_machine_cannot_have_the_digest_that_a_spec_requires() -> None:
    _, (problem,) = problems_in(
        EXAMPLES / "v5e-16.job.yaml", ["image={reference: 'trainer:1', digest_policy: require_digest}"], target="local"
    )
    assert (problem.path, problem.code) == ("image.digest_policy", "image-digest")
