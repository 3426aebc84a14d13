"""Mixtures of experts in the training step: their terms, their balancing, their loads, in every form a step has."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tests.trainer.configs import layout, mixture, put, ragged_batch
from trainer.config.terms import model_terms
from trainer.config.treatment import treatments
from trainer.config.weights import stacked_path, weights
from trainer.loss import LossSums
from trainer.state import describe_state, initial_state, state_items
from trainer.step import make_eval_step, make_train_step

TERMS = ("loss.load_balance_weight=0.5", "loss.router_z_loss_weight=0.2", "loss.z_loss_weight=0.1")
BALANCED = {"router": {"scoring": "sigmoid", "bias_balancing": {"update_rate": 0.01}}}
STILL = {"type": "sgd", "momentum": 0.0, "clip_norm": None}
FORMS = {
    "scanned, accumulation 2, fsdp 4": ("batch.accumulation=2", "mesh.ici.fsdp=4", "mesh.ici.data=2"),
    "unrolled, nothing recomputed": ("model.layers=unroll", "model.remat=none"),
    "unrolled, accumulation 8, remat dots": ("batch.accumulation=8", "model.layers=unroll", "model.remat=dots"),
}
STEPS = 2


def steps(*overrides: str, devices: int = 1, count: int = STEPS, mlp: dict[str, Any] | None = None) -> Any:
    """The metrics of each step, and the parameters after the last by stacked path."""
    run = mixture(*overrides, mlp=mlp, optimizer=STILL)
    where = layout(run, devices)
    spec = describe_state(run, where)
    state, step = initial_state(run, spec), make_train_step(run, spec, where)
    found: list[dict[str, np.ndarray]] = []
    for n in range(count):
        state, metrics = step(state, put(ragged_batch(n), where))
        found.append({name: np.asarray(value) for name, value in metrics.items()})
    params: dict[str, list[np.ndarray]] = {}
    for path, value in state_items(state)["params"].items():
        params.setdefault(stacked_path(path), []).append(np.asarray(value))
    return found, {path: values[0] if len(values) == 1 else np.stack(values) for path, values in params.items()}


@pytest.fixture(scope="module")
def reference() -> Any:
    """Scanned, recomputed, on one device, the batch at once."""
    return steps(*TERMS, mlp=BALANCED)


@pytest.mark.parametrize("form", [form if number == 0 else pytest.param(form, marks=pytest.mark.full) for number, form in enumerate(FORMS)])
def test_terms_loads_and_what_a_step_makes_of_them_are_the_same_in_every_form(form: str, reference: Any) -> None:
    found, params = steps(*TERMS, *FORMS[form], devices=8 if "fsdp" in form else 1, mlp=BALANCED)
    for n in range(STEPS):
        for name, value in reference[0][n].items():
            np.testing.assert_allclose(found[n][name], value, rtol=2e-5, atol=1e-7, err_msg=name)
    for path, value in reference[1].items():
        np.testing.assert_allclose(params[path].reshape(value.shape), value, rtol=1e-4, atol=2e-6, err_msg=path)


def test_terms_have_values_count_in_the_loss_and_move_the_router(reference: Any) -> None:
    (metrics, *_), with_terms = reference
    (plain, *_), without = steps(mlp=BALANCED)
    added = 0.5 * metrics["load_balance"] + 0.2 * metrics["router_z_loss"] + 0.1 * metrics["z_loss"]
    assert metrics["load_balance"] > 0
    assert metrics["router_z_loss"] > 0
    assert "load_balance" not in plain
    assert metrics["loss"] == pytest.approx(plain["loss"] + added, rel=1e-6)
    for layer in range(2):
        router = [params["segments/1/1/mlp/router/kernel"][layer] for params in (with_terms, without)]
        assert np.abs(router[0] - router[1]).max() > 1e-6


def test_the_balancing_bias_moves_against_the_load_and_nothing_else_moves_it(reference: Any) -> None:
    found, params = reference
    loads = [metrics["expert_load/segments/1/1"] for metrics in found]
    np.testing.assert_allclose(params["segments/1/1/mlp/router/balance"], 0.01 * sum(np.sign(1 - load) for load in loads), atol=1e-8)
    for metrics, load in zip(found, loads, strict=True):
        np.testing.assert_allclose(load.mean(axis=-1), 1, rtol=1e-6)
        assert metrics["expert_load_max"] == load.max() > 1 > load.min() == metrics["expert_load_min"]
        assert metrics["dropped_choices"] == 0


@pytest.mark.full
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("term", ["load_balance", "router_z_loss"])
def test_a_term_by_itself_moves_the_router(term: str, accumulation: int) -> None:
    (plain,), without = steps(f"batch.accumulation={accumulation}", count=1)
    (metrics,), with_term = steps(f"batch.accumulation={accumulation}", f"loss.{term}_weight=1.0", count=1)
    assert metrics["loss"] == pytest.approx(plain["loss"] + metrics[term], rel=1e-6)
    assert np.abs(with_term["segments/1/1/mlp/router/kernel"] - without["segments/1/1/mlp/router/kernel"]).max() > 1e-6


@pytest.mark.full
def test_balancing_evens_the_load_out() -> None:
    found, _ = steps(mlp={"router": {"scoring": "sigmoid", "bias_balancing": {"update_rate": 0.02}}}, count=40)
    spread = [float(metrics["expert_load_max"] - metrics["expert_load_min"]) for metrics in found]
    assert sum(spread[-8:]) < 0.8 * sum(spread[:8])


def test_no_optimizer_touches_the_balancing_bias_even_where_everything_decays() -> None:
    run = mixture(mlp=BALANCED, optimizer={"type": "adamw", "decay": "all"})
    frozen = [treatment.weight.path for treatment in treatments(run.optimizer, weights(run.model)) if treatment.frozen]
    assert frozen == ["segments/1/1/mlp/router/balance"]


def test_the_optimizer_keeps_nothing_for_the_balancing_bias_and_it_is_saved_with_the_parameters() -> None:
    run = mixture(mlp=BALANCED)
    items = state_items(describe_state(run, layout(run, 1)).abstract)
    assert "segments/1/1/mlp/router/balance" in items["params"]
    assert not [path for path in items["opt"] if "balance" in path]


@pytest.mark.full
def test_evaluation_measures_the_terms_of_training() -> None:
    run = mixture(*TERMS)
    where = layout(run, 1)
    spec = describe_state(run, where)
    state, batch = initial_state(run, spec), put(ragged_batch(0), where)
    sums = make_eval_step(run, spec, where)(state, LossSums.zero(model_terms(run)), batch)
    _, metrics = make_train_step(run, spec, where)(state, batch)
    for term in ("load_balance", "router_z_loss"):
        np.testing.assert_allclose(sums.terms[term] / sums.counts["positions"], metrics[term], rtol=1e-6)
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(np.isfinite(leaf).all()), sums))
