"""Properties of every spec."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings

from launcher.checks import check, problems_of_document
from launcher.manifest import render, to_yaml
from launcher.spec import from_document
from tests.launcher.strategies import MUTATORS, Document, documents, mutated
from trainer.config import parse_document, validate
from trainer.config.train import TrainConfig

FEW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@FEW
@given(documents())
def test_a_valid_document_has_no_problem_and_renders_what_the_server_rules_accept(document: Document) -> None:
    assert check(from_document(document), target="kubernetes") == []


@FEW
@given(documents())
def test_rendering_is_a_function_of_the_spec_and_survives_a_round_trip(document: Document) -> None:
    spec = from_document(document)
    again = from_document(spec.model_dump(mode="json"))
    assert again == spec and again.hash == spec.hash
    assert to_yaml(render(spec)) == to_yaml(render(again))
    (mounted,) = (manifest["data"]["train.json"] for manifest in render(spec) if manifest["kind"] == "ConfigMap")
    assert validate(TrainConfig, parse_document(mounted, name="train.json")) == spec.train


@settings(FEW, max_examples=8)
@given(documents())
def test_a_broken_document_is_refused_at_the_right_path(document: Document) -> None:
    for mutator in MUTATORS:
        result = mutated(document, mutator)
        if result is None:
            continue
        broken, path = result
        _, found = problems_of_document(broken, target="kubernetes")
        assert path in [problem.path for problem in found], (mutator.__name__, path, found)
        assert all(problem.message and problem.code for problem in found)
