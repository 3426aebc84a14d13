"""The rules of the API server, JobSet, Job controller and Kueue on a rendered JobSet: broken one at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from launcher.checks import check_jobset, load
from launcher.manifest import render
from tests.launcher.regenerate import EXAMPLES

JobSet = dict[str, Any]


@pytest.fixture(scope="module")
def rendered() -> JobSet:
    return render(load(EXAMPLES / "v5p-128-spot.job.yaml", ["queue=q", "placement=tas"]))[-1]


def put(path: str, value: Any) -> Callable[[JobSet], None]:
    def mutate(jobset: JobSet) -> None:
        *parents, last = path.split("/")
        node: Any = jobset
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[int(last) if isinstance(node, list) else last] = value

    return mutate


RJ = "spec/replicatedJobs/0"
JOB = f"{RJ}/template/spec"
POD = f"{JOB}/template/spec"
CONTAINER = f"{POD}/containers/0"
RULES = "spec/failurePolicy/rules"
POD_RULES = f"{JOB}/podFailurePolicy/rules"


def twice(path: str) -> Callable[[JobSet], None]:
    """Repeat the first item of the list at `path`."""

    def mutate(jobset: JobSet) -> None:
        node: Any = jobset
        for part in path.split("/"):
            node = node[int(part)] if isinstance(node, list) else node[part]
        node.append(copy.deepcopy(node[0]))

    return mutate


BROKEN: list[tuple[int, Callable[[JobSet], None]]] = [
    (1, put("metadata/name", "a" * 56)),
    (2, put("metadata/name", "a" * 48)),
    (3, put("metadata/name", "1a")),
    (4, put("spec/network/subdomain", "s" * 60)),
    (5, put("spec/network/subdomain", "a.b")),
    (6, put(f"{RJ}/groupName", "Group")),
    (7, put(f"{RJ}/replicas", 2**30)),
    (8, twice("spec/replicatedJobs")),
    (8, put(f"{RJ}/dependsOn", [{"name": "other", "status": "Ready"}])),
    (9, put("spec/successPolicy", {"operator": "All", "targetReplicatedJobs": ["other"]})),
    (9, put(f"{RULES}/0/targetReplicatedJobs", ["other"])),
    (10, put(f"{RULES}/0/name", "1st")),
    (10, put(f"{RULES}/1/name", "fatal")),
    (11, put(f"{RULES}/0/onJobFailureReasons", ["Oops"])),
    (11, put(f"{RULES}/0/onJobFailureMessagePatterns", ["("])),
    (11, put(f"{RULES}/0/onJobFailureMessagePatterns", ["(?=a)"])),
    (12, put("spec/coordinator/replicatedJob", "other")),
    (12, put("spec/coordinator/jobIndex", 4)),
    (12, put("spec/coordinator/podIndex", 16)),
    (13, put("spec/managedBy", "me")),
    (14, put("spec/ttlSecondsAfterFinished", -1)),
    (15, put("spec/volumeClaimPolicies", [{"templates": [{"metadata": {"name": "unmounted"}}]}])),
    (16, put("spec/failurePolicy/restartStrategy", "InPlaceRestart")),
    (17, put(f"{JOB}/completions", None)),
    (18, put(f"{POD}/restartPolicy", "OnFailure")),
    (18, put(f"{POD_RULES}/0/onExitCodes/values", [2, 1])),
    (18, put(f"{POD_RULES}/0/onExitCodes/values", [0, 1])),
    (18, put(f"{POD_RULES}/0/onExitCodes/containerName", "other")),
    (18, put(f"{POD_RULES}/0/onPodConditions", [])),
    (19, twice(f"{POD}/volumes")),
    (19, twice(f"{POD}/containers")),
    (19, twice(f"{CONTAINER}/volumeMounts")),
    (19, twice(f"{CONTAINER}/env")),
    (19, put(f"{CONTAINER}/resources/requests", {"google.com/tpu": 2})),
    (20, put("metadata/labels/kueue.x-k8s.io~1queue-name", "A B")),
    (23, put(f"{JOB}/template/metadata/annotations/kueue.x-k8s.io~1podset-slice-size", "7")),
    (24, put("metadata/labels/team", "a b")),
    (25, put(f"{POD}/nodeSelector/cloud.google.com~1gke-tpu-topology", "4x4x8")),
    (25, put(f"{POD}/nodeSelector/cloud.google.com~1gke-tpu-topology", "4x4x5")),
]


def restored(mutate: Callable[[JobSet], None], jobset: JobSet) -> JobSet:
    """A broken copy; `~1` in a key stands for `/`, `None` for a key that is not there."""
    broken = copy.deepcopy(jobset)
    mutate(broken)

    def tidy(node: Any) -> Any:
        if isinstance(node, dict):
            return {key.replace("~1", "/"): tidy(value) for key, value in node.items() if value is not None}
        return [tidy(item) for item in node] if isinstance(node, list) else node

    return tidy(broken)


def test_what_the_launcher_renders_breaks_no_rule(rendered: JobSet) -> None:
    assert list(check_jobset(rendered)) == []


@pytest.mark.parametrize(("rule", "mutate"), BROKEN, ids=[f"{rule}-{i}" for i, (rule, _) in enumerate(BROKEN)])
def test_a_broken_jobset_names_its_rule(rendered: JobSet, rule: int, mutate: Callable[[JobSet], None]) -> None:
    assert f"server-{rule}" in [problem.code for problem in check_jobset(restored(mutate, rendered))]


def test_kueue_takes_eighteen_replicated_jobs(rendered: JobSet) -> None:
    many = copy.deepcopy(rendered)
    many["spec"]["replicatedJobs"] = [{**many["spec"]["replicatedJobs"][0], "name": f"s{index}"} for index in range(19)]
    del many["spec"]["coordinator"]
    assert {problem.code for problem in check_jobset(many)} == {"server-22"}
