"""JobSets that other tools have made: they stand beside ours, are looked at by the same commands, and break none of them."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from launcher.backend import Manifest
from launcher.backend.kubernetes_api import JOBSET, POD, Api, Resource
from launcher.backend.kubernetes_errors import NotAllowed
from launcher.backend.kubernetes_scene import NODE, SceneReader
from launcher.backend.scene import Scene, own_events, scene_from_data
from launcher.backend.status import GLOBAL_INDEX_LABEL, JOB_INDEX_LABEL, JobState, job_status
from launcher.observe.why import why

CHIPS_USED = scene_from_data(json.loads((Path(__file__).parent / "situations" / "chips-used.json").read_text()))


class Cluster(Api):
    """Answers with what it was given; a kind without an answer may not be listed."""

    def __init__(self, answers: dict[Resource, list[Manifest]]) -> None:
        self.answers = answers

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC)

    def list_whole(self, resource: Resource, *_: Any, **__: Any) -> list[Manifest]:
        if resource in (JOBSET, POD, NODE) and resource not in self.answers:
            raise NotAllowed(f"cannot list {resource.plural}")
        return self.answers.get(resource, [])


def other(name: str, spec: Manifest, **counts: int) -> Manifest:
    """A JobSet of one replicated job `w` beside the one that waits."""
    status = {"replicatedJobsStatus": [{"name": "w", **counts}]} if counts else {}
    return {"metadata": {"name": name, "uid": name}, "spec": spec, "status": status}


def wants(hosts: int | None, *, selector: bool = True, chips: bool = True) -> Manifest:
    pod = CHIPS_USED.pods[0]["spec"]
    resources = {"limits": {"google.com/tpu": "4"}} if chips else {"limits": {"cpu": "1"}}
    template = {"nodeSelector": pod["nodeSelector"] if selector else {}, "containers": [{"name": "c", "resources": resources}]}
    job: Manifest = {"template": {"spec": template}, **({"parallelism": hosts} if hosts else {})}
    return {"replicatedJobs": [{"name": "w", "template": {"spec": job}}]}


def beside(*rivals: Manifest) -> Scene:
    """The recorded job that finds no place, as read beside other JobSets."""
    cluster = Cluster({JOBSET: [CHIPS_USED.jobset, *rivals], POD: list(CHIPS_USED.pods), NODE: list(CHIPS_USED.nodes)})
    return SceneReader(cluster, CHIPS_USED.namespace).read(CHIPS_USED.jobset)


@pytest.mark.parametrize("spec", [{}, {"replicatedJobs": []}, {"replicatedJobs": None}], ids=str)
def test_a_jobset_without_jobs_which_the_server_takes_has_a_status_and_disturbs_no_other(spec: Manifest) -> None:
    empty = other("empty", spec)
    assert job_status(empty, []).slices == ()
    assert own_events(empty, []) == ()
    told = Scene(jobset=empty, read_at=CHIPS_USED.read_at)
    assert (told.status.state, why(told).code) == (JobState.PENDING, "no-jobs")
    assert "nothing runs" in why(told).sentence and "replicatedJobs" in why(told).fix
    assert "holder (4 hosts)" in why(beside(empty, other("holder", wants(4), active=1, ready=1))).sentence


def test_who_holds_the_place_is_who_runs_there_with_that_resource() -> None:
    found = why(
        beside(
            other("holder", wants(4), active=1, ready=1),
            other("waits-too", wants(4), active=1, ready=0),
            other("one-host", wants(None), active=1, ready=1),
            other("suspended", wants(4), active=0, ready=0, suspended=1),
            other("just-made", wants(4)),
            other("on-the-processor", wants(7, selector=False, chips=False), active=1, ready=1),
        )
    )
    assert found.code == "chips-used"
    assert found.sentence.endswith("used by holder (4 hosts), one-host (1 host)")
    assert why(beside(other("starts", wants(4), active=1, ready=0))).sentence.endswith("used by starts (4 hosts)")


def test_a_user_who_may_not_list_jobsets_is_told_why_his_job_waits_all_the_same() -> None:
    cluster = Cluster({POD: list(CHIPS_USED.pods), NODE: list(CHIPS_USED.nodes)})
    scene = SceneReader(cluster, CHIPS_USED.namespace).read(CHIPS_USED.jobset)
    assert scene.unreadable == ("jobsets",)
    assert why(scene).code == "chips-used"
    assert "may not list jobsets" in why(scene).sentence


def test_a_job_that_fills_all_nodes_and_still_waits_is_told_that_it_waits_for_itself() -> None:
    first, *rest = CHIPS_USED.pods
    nodes = tuple(n for n in CHIPS_USED.nodes if first["spec"]["nodeSelector"].items() <= n["metadata"]["labels"].items())
    placed = [
        {**pod, "spec": {**pod["spec"], "nodeName": node["metadata"]["name"]}, "status": {"phase": "Running"}}
        for pod, node in zip(rest, nodes, strict=False)
    ]
    found = why(replace(CHIPS_USED, pods=(first, *placed), nodes=nodes[: len(placed)], rivals=()))
    assert found.code == "chips-used"
    assert f"used by {CHIPS_USED.name} itself ({len(placed)} node" in found.sentence
    assert "fewer slices or hosts" in found.fix


def test_hosts_of_several_replicated_jobs_are_counted_once_each() -> None:
    jobset = other("two", {"replicatedJobs": [{"name": "leader", "template": {"spec": {}}}]})
    jobset["spec"]["replicatedJobs"].append({"name": "workers", "replicas": 2, "template": {"spec": {"parallelism": 3}}})
    ready = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}

    def pod(job: int, overall: int, worker: int) -> Manifest:
        labels = {JOB_INDEX_LABEL: str(job), GLOBAL_INDEX_LABEL: str(overall), "batch.kubernetes.io/job-completion-index": str(worker)}
        return {"metadata": {"name": f"{overall}-{worker}", "labels": labels}, "spec": {}, "status": ready}

    status = job_status(jobset, [pod(0, 0, 0), *(pod(job, job + 1, worker) for job in range(2) for worker in range(3))])
    assert [(part.slice_index, part.ready, part.hosts) for part in status.slices] == [(0, 1, 1), (1, 3, 3), (2, 3, 3)]
