"""What a person is told to type next can be typed, and does what it is told for."""

from __future__ import annotations

import copy

import pytest

from launcher.checks import problems_of_document
from launcher.observe.cause import Cause
from tests.launcher.test_checks import CPU, TPU
from trainer.config import apply_overrides


def test_commands_about_a_local_job_say_that_it_is_local() -> None:
    fix = "correct it, then: nnxlaunch validate SPEC; nnxlaunch submit SPEC --replace; nnxlaunch logs r1 -f"
    told = Cause(code="c", sentence="s", fix=fix).told_with(" -n team --backend local").fix
    assert told == (
        "correct it, then: nnxlaunch validate SPEC; nnxlaunch submit -n team --backend local SPEC --replace; "
        "nnxlaunch logs -n team --backend local r1 -f"
    )


def test_another_type_of_slice_keeps_their_number() -> None:
    document = apply_overrides(copy.deepcopy(TPU) | {"tpu": {"type": "v5p-128", "slices": 4}}, ["tpu.type=v5p-256"])
    assert document["tpu"] == {"type": "v5p-256", "slices": 4}


def test_a_key_of_the_train_section_at_the_top_level_is_told_its_place() -> None:
    (problem,) = problems_of_document(copy.deepcopy(CPU) | {"checkpoint": {}})[1]
    assert problem.hint == "did you mean 'train.checkpoint'?"


@pytest.mark.parametrize(
    "wrong", ["train.steps=0", "train.batch.global_batch=x", "capacity={type: reservation}", "train.data.sources=[{}]"]
)
def test_a_required_key_with_a_wrong_value_hides_no_other_problem(wrong: str) -> None:
    document = apply_overrides(copy.deepcopy(TPU), [wrong, "name=Bad_Name", "train.mesh.dcn={data: 3}"])
    found = {problem.path for problem in problems_of_document(document)[1]}
    assert len(found) == 3 and found > {"name", "train.mesh.dcn"}


def test_an_accelerator_that_does_not_exist_hides_no_problem_that_any_would_have() -> None:
    changes = ["tpu.type=v5p-120", "train.schedule={type: cosine, learning_rate: 0.1, warmup_steps: 1000000}", "train.mesh.ici={fsdp: 48}"]
    document = apply_overrides(copy.deepcopy(TPU), changes)
    found = {problem.path for problem in problems_of_document(document)[1]}
    assert found == {"tpu.type", "train.schedule.warmup_steps"}
