"""Layers in a pipeline compute what they compute in order: values, gradients, by-products; and they talk only to their neighbours."""

from __future__ import annotations

import re
from itertools import product

import jax
import pytest

from tests.trainer.pipelines import Case, assert_equal_to_layers_in_order, pipelined, with_gradients

COMMITTED = (
    Case(stages=1, microbatches=2, fsdp=2),
    Case(stages=2, repeats=3, microbatches=2, fsdp=2, data=2),
    Case(stages=2, repeats=2, microbatches=4, patterns=2, delay=True, gather="once", fsdp=2),
    Case(stages=4, microbatches=4, patterns=2, fsdp=2),
    Case(stages=4, repeats=3, microbatches=8, gather="repeat", fsdp=2),
    Case(stages=8, repeats=2, microbatches=16, delay=True, gather="repeat"),
)


@pytest.mark.parametrize("case", COMMITTED, ids=str)
def test_loss_gradients_and_by_products_are_those_of_the_layers_in_order(case: Case) -> None:
    assert_equal_to_layers_in_order(case)


@pytest.mark.full
@pytest.mark.parametrize("delay", [False, True])
@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_so_they_are_for_every_legal_shape(stages: int, repeats: int, delay: bool) -> None:
    gathers = ("iteration", "once", "repeat") if repeats > 1 else ("iteration", "once")
    for lanes, patterns, gather in product((2, 4) if delay else (1, 2, 4), (1, 2), gathers):
        fsdp = min(2, 8 // stages)
        assert_equal_to_layers_in_order(
            Case(stages=stages, repeats=repeats, microbatches=lanes * stages, patterns=patterns, delay=delay, gather=gather, fsdp=fsdp)
        )


@pytest.mark.parametrize("gather", ["iteration", "repeat"])
@pytest.mark.parametrize("delay", [False, True])
def test_nan_in_the_slots_of_bubbles_reaches_neither_loss_nor_gradient(gather: str, delay: bool) -> None:
    case = Case(stages=4, repeats=2, microbatches=8, gather=gather, delay=delay)  # pyright: ignore[reportArgumentType]
    assert_equal_to_layers_in_order(case, idle=float("nan"))


def test_a_remat_policy_changes_nothing_but_what_is_kept() -> None:
    case = Case(stages=2, repeats=2, microbatches=4, fsdp=2, gather="repeat")
    assert_equal_to_layers_in_order(case, policy=jax.checkpoint_policies.nothing_saveable)


COLLECTIVE = re.compile(r"= \S+ (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(.*$")


def collectives(case: Case) -> dict[str, list[str]]:
    """Kinds of collectives in the compiled forward pass and gradient, by depth of loop; those of the cost `x`'s layout has at the borders are at depth 0."""
    inputs = case.inputs()
    program = with_gradients(pipelined(case)).lower(inputs["weight"], inputs["x"], inputs["scale"]).compile().as_text()
    found: dict[str, list[str]] = {}
    for line in program.splitlines():
        if match := COLLECTIVE.search(line):
            name = re.search(r'op_name="([^"]*)"', line)
            depth = name[1].count("while/body") if name else 0
            found.setdefault(str(depth), []).append(match[1])
    return found


def test_in_an_iteration_stages_exchange_two_permutes_forward_and_two_backward_and_nothing_else() -> None:
    found = collectives(Case(stages=4, repeats=2, microbatches=8))
    assert found["1"] == ["collective-permute"] * 4


def test_weights_gathered_once_are_not_gathered_in_an_iteration_and_those_of_a_repeat_once_for_each() -> None:
    shape = {"stages": 2, "repeats": 2, "microbatches": 4, "fsdp": 2}
    gathers = {
        gather: {depth: kinds.count("all-gather") for depth, kinds in collectives(Case(gather=gather, **shape)).items()}
        for gather in ("iteration", "once", "repeat")
    }
    assert gathers == {}
