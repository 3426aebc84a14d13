"""`doctor` on a real cluster: all is well, a right is missing, a pod writes where checkpoints go, or cannot start."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.doctor.permissions import QUEUE_USER, SUBMITTER, VIEWER, Right
from tests.cluster.test_access import ROLE, Login, login
from tests.cluster.tools import document, kubectl, nnxlaunch
from tests.gcs_emulator import Gcs
from trainer.probe import main as probe

__all__ = ["login"]


def doctor(*words: str) -> tuple[int, list[dict[str, str]]]:
    done = nnxlaunch("doctor", *words, "--output", "json")
    return done.returncode, json.loads(done.stdout)


def levels(found: list[dict[str, str]], check: str) -> set[str]:
    return {line["level"] for line in found if line["check"] == check}


def test_a_cluster_that_can_run_jobs_has_nothing_to_repair(namespace: str) -> None:
    code, found = doctor("-n", namespace)
    assert code == 0, found
    for check in ("access", "namespace", "rights", "jobset"):
        assert levels(found, check) == {"pass"}, found
    assert "tpu-v5-lite-podslice" in " ".join(line["message"] for line in found if line["check"] == "nodes")
    assert all(line["fix"] for line in found if line["level"] != "pass")


def test_what_is_not_there_is_named_with_the_command_that_makes_it(namespace: str, login: Login) -> None:
    code, found = doctor("-n", "no-such-namespace")
    (line,) = (line for line in found if line["check"] == "namespace")
    assert (code, line["level"], line["fix"]) == (1, "fail", "kubectl create namespace no-such-namespace")
    code, (line,) = doctor("--kubeconfig", login({"token": "expired"}))
    assert (code, line["check"], line["level"]) == (1, "access", "fail") and "log in again" in line["fix"]


def test_the_role_is_all_a_submitter_needs_and_all_it_grants(namespace: str, login: Login) -> None:
    kubectl("-n", namespace, "create", "serviceaccount", "examined")
    kubeconfig = login({"token": kubectl("-n", namespace, "create", "token", "examined").strip()})
    code, found = doctor("--kubeconfig", kubeconfig)
    assert code == 1 and "you may not" in " ".join(line["message"] for line in found if line["level"] == "fail")
    kubectl("-n", namespace, "apply", "-f", str(ROLE))
    kubectl("-n", namespace, "create", "rolebinding", "examined", "--role=nnxlaunch", f"--serviceaccount={namespace}:examined")
    code, found = doctor("--kubeconfig", kubeconfig)
    assert code == 0 and levels(found, "rights") == {"pass", "warn"}, found
    assert granted(namespace, "--kubeconfig", kubeconfig) == {*SUBMITTER, *QUEUE_USER}


def granted(namespace: str, *user: str) -> set[Right]:
    """What a user may do in a namespace, beside what everybody may."""
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview", "spec": {"namespace": namespace}}
    answer = json.loads(kubectl(*user, "create", "--validate=false", "-o", "json", "-f", "-", stdin=json.dumps(review)))
    return {
        Right(group, resource, verb)
        for rule in answer["status"]["resourceRules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        if not resource.startswith("selfsubject")
    }


def test_the_kustomization_gives_a_group_the_two_roles_in_any_namespace(tmp_path: Path) -> None:
    shutil.copytree(ROLE.parent, tmp_path / "base")
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    name = f"nnx-{uuid.uuid4().hex[:8]}"
    overlay.joinpath("kustomization.yaml").write_text(yaml.safe_dump({"namespace": name, "resources": ["../base"]}))
    kubectl("apply", "-k", str(overlay))
    try:
        level = kubectl("get", "namespace", name, "-o", "jsonpath={.metadata.labels.pod-security\\.kubernetes\\.io/enforce}")
        assert level == "restricted"
        member = ("--as=alice@example.com", "--as-group=nnxlaunch-submitters", "--as-group=system:authenticated")
        assert granted(name, *member) == {*SUBMITTER, *QUEUE_USER, *VIEWER}
        assert granted("default", *member) == {*VIEWER}
        assert granted(name, "--as=bob@example.com", "--as-group=system:authenticated") == set()
    finally:
        kubectl("delete", "-k", str(overlay), "--wait=false")


@pytest.fixture
def spec(tmp_path: Path, image: str, storage: Gcs) -> dict[str, Any]:
    """A small job whose checkpoints go to an object store that is there."""
    directory = f"{storage.url}/{uuid.uuid4().hex[:8]}"
    resources = {"cpu": "50m", "memory": "512Mi"}
    return document("examined", image=image, directory=directory, env=dict(storage.environment), resources=resources, volumes=[])


def examined(spec: dict[str, Any], tmp_path: Path, namespace: str, *words: str) -> tuple[int, list[dict[str, str]]]:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(spec))
    found = doctor(str(path), "-n", namespace, *words)
    assert "doctor-" not in kubectl("-n", namespace, "get", "jobsets,pods,configmaps,serviceaccounts,networkpolicies", "-o", "name")
    return found


def test_a_pod_of_the_job_writes_where_its_checkpoints_go(spec: dict[str, Any], tmp_path: Path, namespace: str) -> None:
    code, found = examined(spec, tmp_path, namespace)
    assert code == 0, found
    for check in ("image", "versions", "scratch", "storage"):
        assert levels(found, check) == {"pass"}, found


def test_a_bucket_that_is_not_there_is_found(storage: Gcs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in storage.environment.items():
        monkeypatch.setenv(name, value)
    probe(["gs://no-such-bucket/runs"])
    (line,) = (json.loads(line) for line in capsys.readouterr().out.splitlines() if '"storage"' in line)
    assert (line["level"], "does not exist" in line["message"]) == ("fail", True), line


def test_an_image_that_cannot_be_pulled_is_found_without_waiting_for_it(spec: dict[str, Any], tmp_path: Path, namespace: str) -> None:
    code, found = examined({**spec, "image": "registry.invalid/team/trainer:1"}, tmp_path, namespace)
    (line,) = (line for line in found if line["level"] == "fail")
    assert (code, line["check"]) == (1, "pod") and "registry.invalid" in line["message"], found


def test_a_host_with_chips_but_without_devices_is_found(spec: dict[str, Any], tmp_path: Path, namespace: str) -> None:
    tpu = {"cpu": None, "tpu": {"type": "v5e-16"}, "resources": {"cpu": "50m", "memory": "512Mi"}}
    train = {**spec["train"], "batch": {"global_batch": 16, "sequence_length": 128}}
    code, found = examined({**spec, **tpu, "train": train}, tmp_path, namespace, "--tpu")
    assert code == 1 and "no device of" in " ".join(line["message"] for line in found if line["check"] == "tpu"), found
