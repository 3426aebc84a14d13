"""Submit: interrupted anywhere it can be repeated; what the installed JobSet does not know is said before anything is sent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.backend import JobState, Manifest
from launcher.backend.kubernetes import KubernetesBackend
from launcher.backend.kubernetes_api import Api, Resource
from launcher.backend.kubernetes_login import log_in
from launcher.backend.kubernetes_schema import OldJobSet, installed_release, jobset_schema, require_known, unknown_fields
from launcher.checks import load
from launcher.errors import AlreadyExists
from launcher.manifest import render
from tests.cluster.proxy import Door, door
from tests.cluster.tools import cheap_job, document, kubectl, nnxlaunch
from tests.container.registry import registry
from tests.launcher.regenerate import EXAMPLES

ROOT = Path(__file__).parents[2]
SUBMIT = """
import json, os, sys
from launcher.backend.kubernetes import KubernetesBackend
KubernetesBackend(kubeconfig=sys.argv[1], namespace=sys.argv[2]).create(json.loads(sys.argv[3]))
"""
WAITS = "import signal; signal.sigwait([signal.SIGTERM])"
KINDS = "jobsets,configmaps,serviceaccounts,networkpolicies"


def submit(through: Door, kubeconfig: Path, namespace: str, manifests: list[Manifest], *, kill_after: int = 0) -> int:
    """Exit status of a process that creates the job and is killed once so many of its changes are done."""
    kubeconfig.write_text(yaml.safe_dump(through.kubeconfig()))
    through.changes.clear()
    through.victim, through.kill_after = None, kill_after
    command = [sys.executable, "-c", "import sys; sys.stdin.read()" + SUBMIT, str(kubeconfig), namespace, json.dumps(manifests)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT) as process:
        through.victim = process.pid
        process.communicate(b"", timeout=120)
    return process.returncode


def made(namespace: str, name: str) -> list[tuple[str, list[str], Any]]:
    """Kind, owners' names and content of everything a submit makes, without what differs from one creation to the next."""
    items = json.loads(kubectl("-n", namespace, "get", KINDS, "-l", f"nnxlaunch/job={name}", "-o", "json"))["items"]
    (jobset,) = (item for item in items if item["kind"] == "JobSet")
    subdomain, spec_hash = jobset["spec"]["network"]["subdomain"], jobset["metadata"]["labels"]["nnxlaunch/spec-hash"]
    return sorted(
        (
            (
                item["kind"],
                [owner["name"] for owner in item["metadata"].get("ownerReferences", [])],
                [item["metadata"].get("annotations"), item.get("spec"), item.get("data")],
            )
            for item in json.loads(json.dumps(items).replace(name, "NAME").replace(subdomain, "SUBDOMAIN").replace(spec_hash, "HASH"))
        ),
        key=str,
    )


def nowhere(name: str, **changes: Any) -> list[Manifest]:
    """A job of which nothing runs: only the objects count."""
    found = cheap_job(name, WAITS, **changes)
    pod = found[-1]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    pod["nodeSelector"] = {"example.com/nowhere": "true"}
    return found


def test_a_submit_killed_after_any_call_is_completed_by_the_next_one(backend: KubernetesBackend, namespace: str, tmp_path: Path) -> None:
    with door() as through:
        assert submit(through, tmp_path / "config", namespace, nowhere("whole")) == 0
        calls = list(through.changes)
        assert calls == ["POST jobsets", "POST serviceaccounts", "POST configmaps", "POST networkpolicies", "PATCH whole"]
        for after, name in enumerate(("kill1", "kill2", "kill3", "kill4"), 1):
            assert submit(through, tmp_path / "config", namespace, nowhere(name), kill_after=after) == -9
            assert backend.get(name).state is JobState.SUSPENDED, "nothing starts before everything is there"
            backend.create(nowhere(name))
            assert made(namespace, name) == made(namespace, "whole"), f"killed after {calls[after - 1]}"


def test_a_half_made_job_of_another_spec_is_not_completed(backend: KubernetesBackend, namespace: str, tmp_path: Path) -> None:
    with door() as through:
        assert submit(through, tmp_path / "config", namespace, nowhere("halfway"), kill_after=1) == -9
    other = nowhere("halfway", grace_seconds=3)
    with pytest.raises(AlreadyExists, match="interrupted submit of another spec"):
        backend.create(other)
    backend.create(other, replace=True)
    assert backend.get("halfway").state is not JobState.SUSPENDED
    with pytest.raises(AlreadyExists, match="exists already") as caught:
        backend.create(other)
    assert "--attach" in caught.value.hint
    backend.delete("halfway")


def test_what_another_tool_has_made_is_not_replaced(backend: KubernetesBackend, namespace: str) -> None:
    (theirs,) = (manifest for manifest in nowhere("theirs") if manifest["kind"] == "JobSet")
    theirs["metadata"]["labels"] = {}
    kubectl("-n", namespace, "create", "-f", "-", stdin=json.dumps(theirs))
    with pytest.raises(AlreadyExists, match="of another tool, which --replace leaves alone"):
        backend.create(nowhere("theirs"), replace=True)
    backend.delete("theirs")


def published(version: str) -> Manifest:
    """The CRD of a JobSet release, as its Go module carries it."""
    go = shutil.which("go") or "/usr/local/go/bin/go"
    command = [go, "mod", "download", "-json", f"sigs.k8s.io/jobset@{version}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "GOFLAGS": "-mod=mod"}, cwd="/")
    path = Path(json.loads(found.stdout)["Dir"], "config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml")
    return yaml.load(path.read_text(), yaml.CSafeLoader)


@pytest.fixture(scope="module", params=["v0.10.1", "v0.8.0"])
def release(request: pytest.FixtureRequest) -> Generator[tuple[str, Resource]]:
    """An older release's JobSet, served beside the installed one under another group."""
    version, crd = request.param, published(request.param)
    group = f"jobset-{version.replace('.', '-')}.{uuid.uuid4().hex[:8]}.example.com"
    crd["metadata"] = {"name": f"jobsets.{group}", "annotations": {"api-approved.kubernetes.io": "unapproved, a test"}}
    crd["spec"] |= {"group": group, "conversion": {"strategy": "None"}}
    kubectl("create", "-f", "-", stdin=json.dumps(crd))
    yield version, Resource(f"{group}/v1alpha2", "JobSet", "jobsets")
    kubectl("delete", "crd", f"jobsets.{group}", "--wait=false")


def test_a_served_schema_tells_its_release_and_decides_as_its_server_does(namespace: str, release: tuple[str, Resource]) -> None:
    version, resource = release
    api = Api(log_in(context=None, kubeconfig=None))
    schema = jobset_schema(_served(api, resource))
    assert schema is not None
    assert installed_release(schema) == version.removeprefix("v").rpartition(".")[0]
    for path in sorted(EXAMPLES.glob("*.job.yaml")):
        for mode in ("smart", "strict"):
            jobset = render(load(path, [f"failure.mode={mode}"]))[-1]
            placed = {**jobset, "apiVersion": resource.api_version, "metadata": {**jobset["metadata"], "namespace": namespace}}
            unknown = unknown_fields(schema, jobset)
            if not unknown:
                api.create(resource, namespace, placed, dry_run=True)
                continue
            assert (version, mode) == ("v0.8.0", "smart")
            with pytest.raises(Exception, match="onJobFailureMessagePatterns"):
                api.create(resource, namespace, placed, dry_run=True)
            with pytest.raises(OldJobSet, match=r"onJobFailureMessagePatterns needs JobSet 0\.10; here serves JobSet 0\.8") as caught:
                require_known(schema, jobset, where="here")
            assert "failure: {mode: strict}" in caught.value.hint


def _served(api: Api, resource: Resource) -> Manifest:
    """The published schema; the server adds a new group to it a moment after it serves the group."""
    for _ in range(600):
        if found := api.published_schema(resource.api_version):
            return found
        kubectl("get", "--raw", "/openapi/v3")
    raise AssertionError(f"{resource.api_version} is never published")


def test_the_installed_jobset_knows_everything_that_is_rendered_and_is_asked_first(backend: KubernetesBackend) -> None:
    manifests = cheap_job("newer", WAITS)
    manifests[-1]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["nodeSelectr"] = {}
    manifests[-1]["spec"]["failurePolicy"]["restartStrategy"] = "Sometimes"
    with pytest.raises(OldJobSet, match=r"restartStrategy: Sometimes needs JobSet 0\.7; .*nodeSelectr needs .* serves JobSet 0\.12"):
        backend.create(manifests)


def test_attach_follows_a_run_to_its_end_and_says_how_it_ended(namespace: str, backend: KubernetesBackend, tmp_path: Path) -> None:
    spec = tmp_path / "job.yaml"
    one = {"cpu": {"hosts": 1}, "grace_seconds": 15}  # the end of one of two hosts could end the other before it speaks
    spec.write_text(yaml.safe_dump(document("followed", **one)))
    backend.create(cheap_job("followed", "print('hello'); raise SystemExit(64)", **one))
    done = nnxlaunch("submit", str(spec), "-n", namespace, "--attach")
    assert "[s0/w0 a0] hello" in done.stdout
    assert (done.returncode, "followed failed: slice 0" in done.stderr) == (125, True), done.stderr
    backend.delete("followed")


def test_a_tag_is_submitted_with_the_digest_that_its_registry_tells(namespace: str, tmp_path: Path) -> None:
    digest = f"sha256:{hashlib.sha256(b'{}').hexdigest()}"
    with registry() as server:
        server.manifests["team/trainer:1"] = b"{}"
        tag = f"{server.host}/team/trainer:1"
        spec = tmp_path / "job.yaml"
        spec.write_text(yaml.safe_dump(document("pinned", image=tag, grace_seconds=15, resources={"cpu": "1000"})))  # starts nowhere
        done = nnxlaunch("submit", str(spec), "-n", namespace)
        assert (done.returncode, done.stderr) == (0, "")
        logs = nnxlaunch("logs", "pinned", "-n", namespace)
        assert (logs.stdout, "no pod has started; see: nnxlaunch why pinned" in logs.stderr) == ("", True), logs.stderr
        required = f"image={{reference: '{server.host}/team/trainer:2', digest_policy: require_digest}}"
        refused = nnxlaunch("submit", str(spec), "-n", namespace, "--set", "name=refused", "--set", required)
    path = "jsonpath={.spec.replicatedJobs[0].template.spec.template.spec.containers[0].image}"
    assert kubectl("-n", namespace, "get", "jobset", "pinned", "-o", path) == f"{tag}@{digest}"
    assert refused.returncode == 69 and "there is no such image (404), and the spec requires its digest" in refused.stderr, refused.stderr
