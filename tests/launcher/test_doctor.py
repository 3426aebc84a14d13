"""What `doctor` concludes from API objects, and that the published roles are exactly the rights it asks about."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.checks import load
from launcher.doctor import Finding, Level
from launcher.doctor.permissions import QUEUE_USER, SUBMITTER, VIEWER, Right, judge
from launcher.doctor.pools import node_pools
from launcher.doctor.rules import pod_security, priorities, queues, xpk
from launcher.spec import JobSpec
from tests.launcher.regenerate import EXAMPLES
from trainer.probe import main as probe

CLUSTER = Path(__file__).parents[2] / "k8s" / "cluster"


def example(name: str, *overrides: str) -> JobSpec:
    return load(EXAMPLES / f"{name}.job.yaml", overrides, target="kubernetes")


def said(findings: Iterable[Finding]) -> list[tuple[Level, str]]:
    return [(finding.level, finding.message) for finding in findings]


@pytest.mark.parametrize(("file", "rights"), [("role", {*SUBMITTER, *QUEUE_USER}), ("view", {*VIEWER})])
def test_a_published_role_grants_exactly_what_the_commands_need(file: str, rights: set[Right]) -> None:
    role = yaml.safe_load((CLUSTER / f"{file}.yaml").read_text())
    granted = {
        Right(group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert granted == rights


def test_a_missing_right_is_named_by_verb_with_the_binding_that_grants_it() -> None:
    (finding, view) = judge([Right("jobset.x-k8s.io", "jobsets", "create"), Right("", "nodes", "list")], namespace="team", queues=True)
    assert said([finding, view]) == [
        (Level.FAIL, "you may not create jobsets.jobset.x-k8s.io in namespace team"),
        (Level.WARN, "you may not list nodes: `why` and `doctor` know less"),
    ]
    assert "create rolebinding" in finding.fix and "--clusterrole=nnxlaunch-view" in view.fix
    assert [finding.level for finding in judge([], namespace="team", queues=False)] == [Level.PASS]


def namespace(level: str | None) -> dict[str, Any]:
    return {"metadata": {"name": "team", "labels": {"pod-security.kubernetes.io/enforce": level} if level else None}}


@pytest.mark.parametrize(
    ("level", "security", "found"),
    [
        ("restricted", "restricted", Level.PASS),
        ("restricted", "root_no_caps", Level.FAIL),
        ("baseline", "root_no_caps", Level.PASS),
        ("baseline", "privileged", Level.FAIL),
        ("privileged", "privileged", Level.PASS),
        (None, "restricted", Level.WARN),
    ],
)
def test_a_pod_security_level_admits_as_its_standard_says(level: str | None, security: str, found: Level) -> None:
    assert [finding.level for finding in pod_security(namespace(level), example("v5e-16", f"security={security}"))] == [found]


def local(name: str, cluster: str, active: str = "True") -> dict[str, Any]:
    conditions = [{"type": "Active", "status": active, "message": "stopped"}]
    return {"metadata": {"name": name, "namespace": "team"}, "spec": {"clusterQueue": cluster}, "status": {"conditions": conditions}}


def cluster_queue(*resources: str, flavor: str = "v5e") -> dict[str, Any]:
    group = {"coveredResources": list(resources), "flavors": [{"name": flavor, "resources": []}]}
    return {"metadata": {"name": "all"}, "spec": {"resourceGroups": [group]}, "status": {}}


def flavor(**labels: str) -> dict[str, Any]:
    return {
        "metadata": {"name": "v5e"},
        "spec": {"nodeLabels": {f"cloud.google.com/gke-tpu-{key}": value for key, value in labels.items()}},
    }


@pytest.mark.parametrize(
    ("clusters", "flavors", "level", "words"),
    [
        ({"all": cluster_queue("google.com/tpu")}, [], Level.PASS, "tpu is active and covers google.com/tpu"),
        ({"all": cluster_queue("google.com/tpu")}, [flavor(accelerator="tpu-v5-lite-podslice", topology="4x4")], Level.PASS, "is active"),
        ({"all": cluster_queue("google.com/tpu")}, [flavor(accelerator="tpu-v5p-slice")], Level.FAIL, "has the nodes the job asks for"),
        ({"all": cluster_queue("cpu", "memory")}, [], Level.FAIL, "does not cover google.com/tpu"),
        ({"all": None}, [], Level.FAIL, "cluster queue all, which does not exist"),
        ({}, [], Level.PASS, "which you may not read"),
    ],
)
def test_a_queue_that_could_never_admit_the_job_is_found(clusters: dict[str, Any], flavors: list[Any], level: Level, words: str) -> None:
    ((found, message),) = said(queues(example("v5e-16", "queue=tpu"), "team", [local("tpu", "all")], clusters, flavors))
    assert (found, words in message) == (level, True), message


def test_a_queue_that_is_missing_stopped_or_passed_by_is_said() -> None:
    spec = example("v5e-16", "queue=tpu")
    assert said(queues(spec, "team", [local("other", "all")], {}, [])) == [
        (Level.FAIL, "namespace team has no LocalQueue 'tpu'; there are: other")
    ]
    assert said(queues(spec, "team", [local("tpu", "all", "False")], {"all": cluster_queue("google.com/tpu")}, [])) == [
        (Level.FAIL, "localqueue tpu is not active: stopped")
    ]
    ((level, message),) = said(queues(example("v5e-16"), "team", [local("tpu", "all")], {}, []))
    assert level is Level.WARN and "beside Kueue's quota" in message
    assert [level for level, _ in said(queues(None, "team", [], {}, []))] == [Level.PASS]


def test_a_cluster_made_by_xpk_is_recognised_and_the_spec_is_told_its_queue() -> None:
    queue = [local("multislice-queue", "cluster-queue")]
    classes = [{"metadata": {"name": name}} for name in ("very-high", "medium", "system-node-critical", "very-low")]
    spec = example("v5e-16", "queue=multislice-queue", "priority=medium")
    assert said(xpk(spec, "default", queue, classes)) == [
        (Level.PASS, "XPK made this cluster: queue multislice-queue in namespace default, priorities very-low, medium, very-high")
    ]
    (elsewhere,) = xpk(spec, "team", queue, classes)
    assert (elsewhere.level, elsewhere.fix) == (Level.WARN, "submit with -n default and `queue: multislice-queue`")
    (without,) = xpk(example("v5e-16"), "default", queue, classes)
    assert (without.level, without.fix) == (Level.WARN, "set `queue: multislice-queue`, `priority: medium`")
    assert not list(xpk(spec, "default", [local("multislice-queue", "mine")], classes))
    assert [finding.level for finding in priorities(spec, classes)] == [Level.PASS]
    assert [finding.level for finding in priorities(spec, classes[:1])] == [Level.FAIL]


def node(pool: str, accelerator: str = "tpu-v5-lite-podslice", topology: str = "4x4", chips: int = 4, ready: bool = True) -> dict[str, Any]:
    tpu = {"cloud.google.com/gke-tpu-accelerator": accelerator, "cloud.google.com/gke-tpu-topology": topology}
    return {
        "metadata": {"name": f"{pool}-node", "labels": {**tpu, "cloud.google.com/gke-nodepool": pool}},
        "spec": {},
        "status": {"allocatable": {"google.com/tpu": str(chips)}, "conditions": [{"type": "Ready", "status": str(ready)}]},
    }


def test_node_pools_are_held_against_the_accelerator_table() -> None:
    whole, broken = [node("whole")] * 4, [*[node("broken")] * 3, node("broken", ready=False)]
    eight = [node("eight", topology="2x4", chips=8)]  # two machines have this topology; its chips tell which
    odd, wrong = [node("odd", chips=64)] * 4, [node("wrong", topology="5x5")]
    assert said(node_pools([*whole, *broken, *eight, *odd, *wrong], None)) == [
        (Level.WARN, "pool broken: 3 of 4 nodes ready, a tpu-v5-lite-podslice 4x4 slice has 4"),
        (Level.WARN, "pool odd: 64 chips a node, tpu-v5-lite-podslice 4x4 has 4"),
        (Level.FAIL, "pool wrong: tpu-v5-lite-podslice '5x5' is not in the accelerator table: v5e has no topology 5x5"),
        (Level.PASS, "tpu-v5-lite-podslice 2x4: 1 slice ready"),
        (Level.PASS, "tpu-v5-lite-podslice 4x4: 1 slice ready"),
    ]
    assert [level for level, _ in said(node_pools(whole, example("v5e-16")))] == [Level.PASS, Level.PASS]
    *_, short = node_pools(whole[:3], example("v5e-16"))
    assert short.level is Level.WARN and "--machine-type ct5lp-hightpu-4t --tpu-topology 4x4" in short.fix


def test_the_probe_says_what_a_pod_can_do_as_lines_that_doctor_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probe([str(tmp_path / "runs"), "--tpu"])
    found = [Finding(**{**json.loads(line), "level": Level(json.loads(line)["level"])}) for line in capsys.readouterr().out.splitlines()]
    by_check = {(finding.check, finding.level) for finding in found}
    assert {("storage", Level.PASS), ("versions", Level.PASS), ("tpu", Level.FAIL)} <= by_check
    assert not list((tmp_path / "runs").iterdir()), "nothing stays"
    (tmp_path / "file").write_text("")
    probe([str(tmp_path / "file" / "runs")])
    (storage,) = (json.loads(line) for line in capsys.readouterr().out.splitlines() if '"storage"' in line)
    assert storage["level"] == "fail" and storage["fix"]
