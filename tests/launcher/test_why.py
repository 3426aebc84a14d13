"""What `why` says about situations recorded on a real control plane, each judged by what was done to make it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.backend.scene import Scene, scene_from_data
from launcher.observe.why import causes, why
from tests.cluster.situations import SITUATIONS, Situation
from trainer.checkpoint.mismatch import compare_meta
from trainer.errors import ResumeMismatch

RECORDED = Path(__file__).parent / "situations"


def recorded(name: str) -> Scene:
    return scene_from_data(json.loads((RECORDED / f"{name}.json").read_text()))


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)
def test_the_dominant_cause_is_what_was_done(situation: Situation) -> None:
    found = why(recorded(situation.name))
    assert found.code == situation.code, found
    missing = [words for words in situation.words if words not in found.sentence]
    assert not missing, found
    assert situation.fix in found.fix, found
    assert found.evidence, "a cause is shown with the object that says it"


def test_a_host_whose_node_stopped_to_answer_is_named() -> None:
    scene = recorded("running")
    (first, second), now = scene.pods, scene.read_at
    conditions = [{**c, "status": "False"} if c["type"] in ("Ready", "ContainersReady") else c for c in second["status"]["conditions"]]
    silent = {**second, "status": {**second["status"], "conditions": conditions}, "spec": {**second["spec"], "nodeName": "tpu-7"}}
    words = "Kubelet stopped posting node status."
    ready = {"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown", "message": words}
    node = {"metadata": {"name": "tpu-7", "labels": {}}, "spec": {}, "status": {"conditions": [ready]}}
    found = why(Scene(jobset=scene.jobset, read_at=now, pods=(first, silent), jobs=scene.jobs, nodes=(node,)))
    assert found.code == "node-not-ready"
    assert "tpu-7 (slice 0, worker 1)" in found.sentence
    assert words in found.evidence[0]


def test_a_trainer_that_says_what_to_do_is_repeated_and_its_hint_is_no_part_of_the_cause() -> None:
    saved = {"config": {"steps": 10}, "step": 4}
    with pytest.raises(ResumeMismatch) as refused:
        compare_meta(saved, {"config": {"steps": 20}}, ())
    scene = copy.deepcopy(recorded("bad-config"))
    for pod in scene.pods:
        ended = pod["status"]["containerStatuses"][0]["state"]["terminated"]
        ended["message"] = f"{refused.value}\nhint: {refused.value.hint}"
    found = why(scene)
    assert found.code == "fatal-exit" and found.fix.startswith(f"{refused.value.hint}; then: nnxlaunch submit SPEC --replace; ")
    assert "allow_mismatch=[steps]" in found.fix and not any("hint" in line for line in found.evidence)
    assert "steps: saved 10, now 20; a restart cannot help" in found.sentence
    assert "steps: saved 10, now 20" in scene.status.message and "hint" not in found.sentence + scene.status.message


def test_between_two_attempts_the_exit_code_is_that_of_the_pods_that_are_still_leaving() -> None:
    for name, code in (("crash-loop", "crash-loop"), ("restart-waits-for-grace", "restarting")):
        scene = copy.deepcopy(recorded(name))
        scene.jobset["status"]["restarts"] += 1  # its pods are of the attempt before it now
        for pod in scene.pods:
            pod["metadata"]["deletionTimestamp"] = scene.read_at
        found = why(scene)
        assert found.code == code
        assert "slice 0, worker 1 exited with 134 (aborted (SIGABRT))" in found.sentence and "now slice" not in found.sentence
        gone = why(replace(scene, pods=()))
        assert "134" not in gone.sentence


def test_every_situation_gives_one_cause_at_least_and_each_names_a_way_on() -> None:
    for situation in SITUATIONS:
        for cause in causes(recorded(situation.name)):
            assert cause.code and cause.sentence and cause.fix, cause
            assert "\n" not in cause.sentence
