"""Layers in a pipeline compute what they compute in order: values, gradients, by-products; and they talk only to their neighbours."""

from __future__ import annotations

import re
from collections import Counter
from itertools import product

import jax
import pytest

from tests.trainer.pipelines import PRODUCT, Case, assert_equal_to_layers_in_order, pipelined, with_gradients

COMMITTED = (
    Case(stages=1, repeats=2, microbatches=2, gather="repeat"),
    Case(stages=2, repeats=3, microbatches=2, fsdp=2, data=2),
    Case(stages=2, repeats=2, microbatches=4, patterns=2, delay=True, gather="once", fsdp=2),
    Case(stages=4, microbatches=8, patterns=2, delay=True, fsdp=2),
    Case(stages=4, repeats=3, microbatches=8, gather="repeat", fsdp=2),
    Case(stages=8, repeats=2, microbatches=16, delay=True, gather="repeat"),
)


NAN = float("nan")


@pytest.mark.parametrize("case", COMMITTED, ids=str)
def test_loss_gradients_and_by_products_are_those_of_the_layers_in_order_though_bubbles_hold_nan(case: Case) -> None:
    assert_equal_to_layers_in_order(case, idle=NAN)


@pytest.mark.full
@pytest.mark.parametrize("delay", [False, True])
@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_so_they_are_for_every_legal_shape(stages: int, repeats: int, delay: bool) -> None:
    gathers = ("iteration", "once", "repeat") if repeats > 1 else ("iteration", "once")
    for lanes, patterns, gather in product((2, 4) if delay else (1, 2, 4), (1, 2), gathers):
        fsdp = min(2, 8 // stages)
        assert_equal_to_layers_in_order(
            Case(stages=stages, repeats=repeats, microbatches=lanes * stages, patterns=patterns, delay=delay, gather=gather, fsdp=fsdp),
            idle=NAN,
        )


OFFLOAD = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=[PRODUCT], offload_src="device", offload_dst="pinned_host"
)


def test_a_remat_policy_changes_nothing_but_what_is_kept_and_where() -> None:
    case = Case(stages=2, repeats=2, microbatches=4, fsdp=2, gather="repeat")
    assert_equal_to_layers_in_order(case, policy=OFFLOAD)


COLLECTIVE = re.compile(r"= \S+ (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def collectives(case: Case) -> list[Counter[str]]:
    """Collectives of floating-point arrays in the compiled loss and gradient, by the depth of the loop they are in."""
    inputs = case.inputs()
    lowered = with_gradients(pipelined(case, policy=jax.checkpoint_policies.nothing_saveable)).lower(*inputs.values())
    found: list[Counter[str]] = [Counter(), Counter(), Counter()]
    for line in lowered.compile().as_text().splitlines():
        name = re.search(r'op_name="([^"]*)"', line)
        if (match := COLLECTIVE.search(line)) and name:
            found[name[1].count("while/body")][match[1]] += 1
    return found


@pytest.mark.parametrize(("microbatches", "permutes"), [(4, 4), (8, 6)])
def test_in_an_iteration_stages_only_hand_on_what_they_computed(microbatches: int, permutes: int) -> None:
    """Forward: results to the next stage, waiting inputs one stage on, results to where they wait unless that is at
    either end of the ring. Backward: the same the other way round."""
    assert collectives(Case(stages=4, repeats=2, microbatches=microbatches))[1] == {"collective-permute": permutes}


GATHERS = {"iteration": (0, 2, 0), "once": (1, 0, 0), "repeat": (2, 2, 0)}
"""By depth of loop. In every iteration, again for its backward pass; once; in every window of a repeat, again for its
backward pass, the last window being outside of the loop over windows."""


@pytest.mark.parametrize("gather", GATHERS)
def test_weights_are_gathered_in_every_iteration_or_once_or_once_for_every_repeat(gather: str) -> None:
    found = collectives(Case(stages=2, repeats=2, microbatches=4, fsdp=2, gather=gather))  # pyright: ignore[reportArgumentType]
    positions = 1  # of the microbatches, once
    assert tuple(kinds["all-gather"] for kinds in found) == (GATHERS[gather][0] + positions, *GATHERS[gather][1:])


def test_a_weight_gathered_for_an_iteration_is_whole_as_it_arrives() -> None:
    """Its parts come one behind the other, also where another dim than its first is split: the dim of stages is not before them."""
    case = Case(stages=2, repeats=2, microbatches=4, fsdp=2)
    lowered = with_gradients(pipelined(case, policy=jax.checkpoint_policies.nothing_saveable)).lower(*case.inputs().values())
    gathers = re.findall(r"= f32\[[^ ]* all-gather\(.*dimensions=\{(\d+)\}.*while/body", lowered.compile().as_text())
    assert gathers == ["0", "0"]
