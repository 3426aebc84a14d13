"""No pipeline that cannot be reaches tracing: `validate` refuses it and names a neighbour that can be; what it accepts can be traced."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings

from tests.trainer.pipeline_documents import Document, documents, machine
from trainer.config import ConfigError, TrainConfig, validate
from trainer.config.checks import check_train
from trainer.config.problem import Problem
from trainer.config.terms import eval_terms
from trainer.loss import LossSums
from trainer.parallel.sharding import Layout
from trainer.state import describe_state
from trainer.step import make_eval_step, make_train_step

HEALTH = [HealthCheck.filter_too_much, HealthCheck.too_slow]


def problems_of(document: Document) -> list[Problem]:
    try:
        config = validate(TrainConfig, document)
    except ConfigError as error:
        return error.problems
    return list(check_train(config, **machine(document)._asdict(), processes=1))


NUMBERS = ("pipeline.segment", "pipeline.layers", "pipeline.microbatches", "batch.global_batch", "eval.global_batch")


def neighbours(problem: Problem, document: Document) -> Iterator[Document]:
    """The document with each of the values that a problem's hint offers."""
    for part in problem.hint.split("; "):
        if found := re.fullmatch(r"(\d+) layers with stage=(\d+) and repeats of 1", part):
            stages = {"ici": {**document["mesh"]["ici"], "stage": int(found[2])}, "dcn": {**document["mesh"]["dcn"], "stage": 1}}
            one = changed(changed(document, "pipeline.layers", int(found[1])), "pipeline.repeats", 1)
            yield changed(one, "mesh", stages)
        elif found := re.fullmatch(r"repeats of (\d+)", part):
            yield changed(document, "pipeline.repeats", int(found[1]))
        elif found := re.fullmatch(r"start and increment that are multiples of (\d+)", part):
            yield changed(document, "batch.ramp_up", {"start": int(found[1]), "increment": int(found[1]), "steps_per_size": 1})
        elif problem.path == "pipeline":
            yield changed(document, "pipeline", {})
        elif problem.path == "pipeline.gather":
            yield changed(document, "pipeline.gather", "once")
        else:
            assert problem.path in NUMBERS
            for value in re.findall(r"\d+", part):
                yield changed(document, problem.path, int(value))


def changed(document: Document, path: str, value: object) -> Document:
    *above, last = path.split(".")
    document = here = copy.deepcopy(document)
    for key in above:
        here = here[key]
    here[last] = value
    return document


@settings(suppress_health_check=HEALTH, max_examples=100, derandomize=True)
@given(documents())
def test_every_refusal_says_what_the_limit_is_and_names_only_neighbours_that_keep_it(document: Document) -> None:
    for problem in problems_of(document):
        assert problem.path and problem.message and problem.hint
        if problem.code != "pipeline":
            continue
        assert problem.limit is not None
        assert problem.value is None or str(problem.value) in problem.message
        offered = list(neighbours(problem, document))
        assert offered, problem
        for other in offered:
            again = [found for found in problems_of(other) if (found.path, found.code) == (problem.path, problem.code)]
            assert not again, f"{problem}\n{again}"


@pytest.mark.full
@settings(suppress_health_check=HEALTH, max_examples=150, derandomize=True)
@given(documents())
def test_what_is_accepted_can_be_traced(document: Document) -> None:
    assume(not problems_of(document))
    trace(document)


def trace(document: Document) -> None:
    """A step of every size of the batch, and an evaluation, as a run makes them. Compiles nothing."""
    config, (slices, devices) = validate(TrainConfig, document), machine(document)
    where = Layout.of(config, jax.devices()[: slices * devices], slices=slices)
    spec = describe_state(config, where)
    for size in config.batch.sizes:
        one = config.of_size(size)
        after, _ = jax.eval_shape(make_train_step(one, spec, where), spec.abstract, batch_of(one, where, size))
        assert jax.tree.structure(after) == jax.tree.structure(spec.abstract)
    if config.eval is not None:
        batch = batch_of(config, where, config.eval.global_batch or config.batch.global_batch)
        jax.eval_shape(make_eval_step(config, spec, where), spec.abstract, LossSums.zero(eval_terms(config)), batch)


def batch_of(config: TrainConfig, where: Layout, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    shape = rows, config.batch.sequence_length
    sharding = where.of_batch(config).sharding(("batch", "length"), shape)
    dtypes = {"inputs": np.int32, "targets": np.int32, "positions": np.int32, "segments": np.int32, "weights": np.float32}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}
