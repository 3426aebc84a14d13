"""What mixtures of experts hand out beside their results, gathered from layers in either form."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tests.trainer.configs import mixture
from trainer.model.byproducts import mixture_sums, statistics_metrics

REPEATS, EXPERTS = 2, 4
PLACE = "segments/1/1"


def sums_of_layers() -> list[dict[str, np.ndarray]]:
    """What the mixture of each layer hands out."""
    random = np.random.default_rng(0)
    shapes = {"load_balance": (), "router_z_loss": (), "load": (EXPERTS,), "dropped": ()}
    return [{name: random.random(shape, np.float32) for name, shape in shapes.items()} for _ in range(REPEATS)]


def products(form: str, layers: list[dict[str, np.ndarray]]) -> list[Any]:
    """By-products of the three blocks of the model: one without a mixture, then a pattern of one without and one with."""
    if form == "scan":
        return [[{}], [{}, {"moe": jax.tree.map(lambda *values: np.stack(values), *layers)}]]
    return [[[{}]], [[{}, {"moe": sums}] for sums in layers]]


@pytest.mark.parametrize("form", ["scan", "unroll"])
def test_terms_are_means_over_the_mixtures_and_statistics_those_of_each_in_either_form_of_layers(form: str) -> None:
    layers = sums_of_layers()
    terms, statistics = mixture_sums(mixture(f"model.layers={form}").model, products(form, layers))
    for name in ("load_balance", "router_z_loss"):
        np.testing.assert_allclose(terms.pop(name), np.mean([sums[name] for sums in layers]), rtol=1e-6)
    for name in ("load", "dropped"):
        np.testing.assert_array_equal(statistics.pop(f"{name}/{PLACE}"), np.stack([sums[name] for sums in layers]))
    assert not terms and not statistics


@pytest.mark.parametrize("form", ["scan", "unroll"])
def test_a_mixture_whose_sums_are_lost_on_the_way_is_an_error_by_its_place(form: str) -> None:
    model, lost = mixture(f"model.layers={form}").model, products(form, sums_of_layers())
    (lost[1][1] if form == "scan" else lost[1][0][1]).pop("moe")
    with pytest.raises(ValueError, match=f"experts at {PLACE} did not hand out"):
        mixture_sums(model, lost)
    with pytest.raises(ValueError, match=f"experts at {PLACE} did not hand out"):
        mixture_sums(model, products(form, sums_of_layers()[1:]))


def test_a_model_without_mixtures_has_no_loads_to_log() -> None:
    assert statistics_metrics({}) == {}
