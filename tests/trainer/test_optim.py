"""Optimizer and schedules against optax's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.optimizer import AdamW, Constant, Cosine, WarmupStableDecay
from trainer.config.treatment import treatments
from trainer.config.weights import Normal, Weight
from trainer.optim import build_optimizer, build_schedule

MATRIX = Weight("matrix", (4, 3), ("embed", "mlp"), Normal(1), 1)
SCALE = Weight("scale", (3,), ("norm",), Normal(1), 0)


@pytest.mark.parametrize("clip_norm", [None, 0.5, 1e6])
def test_ten_updates_equal_those_of_optax_adamw_behind_its_clipping(clip_norm: float | None) -> None:
    random = np.random.default_rng(0)
    params = {"matrix": jnp.asarray(random.normal(size=(4, 3)), jnp.float32), "scale": jnp.ones(3)}
    schedule = build_schedule(Cosine(learning_rate=0.1, warmup_steps=3), 10)
    config = AdamW(weight_decay=0.3, clip_norm=clip_norm)
    ours = build_optimizer(config, schedule, treatments(config, [MATRIX, SCALE]))
    theirs = optax.chain(
        optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=config.b1, b2=config.b2, eps=config.epsilon, weight_decay=0.3, mask={"matrix": True, "scale": False}),
    )
    mine, other = (params, ours.init(params)), (params, theirs.init(params))
    for _ in range(10):
        gradient = jax.tree.map(lambda p: jnp.asarray(random.normal(size=p.shape), jnp.float32), params)
        steps, state = ours.update(gradient, mine[1], mine[0])
        mine = optax.apply_updates(mine[0], steps), state
        steps, state = theirs.update(gradient, other[1], other[0])
        other = optax.apply_updates(other[0], steps), state
    for name in params:
        np.testing.assert_allclose(mine[0][name], other[0][name], rtol=1e-5, atol=1e-7)


def test_a_gradient_of_zero_leaves_finite_parameters() -> None:
    params = {"matrix": jnp.ones((4, 3))}
    tx = build_optimizer(AdamW(), build_schedule(Constant(learning_rate=0.1), 1), treatments(AdamW(), [MATRIX]))
    steps, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert bool(jnp.isfinite(steps["matrix"]).all())


@given(warmup=st.integers(0, 20), length=st.integers(1, 80), peak=st.floats(1e-6, 1), final=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_cosine_rises_linearly_falls_as_optax_says_and_stays(warmup: int, length: int, peak: float, final: float) -> None:
    steps = warmup + length
    ours = build_schedule(Cosine(learning_rate=peak, warmup_steps=warmup, final_fraction=final), steps)
    theirs = optax.cosine_decay_schedule(peak, length, final)
    for step in {0, warmup // 2, warmup, warmup + length // 2, steps, steps + 10}:
        expected = peak * (step + 1) / warmup if step < warmup else float(theirs(step - warmup))
        np.testing.assert_allclose(float(ours(step)), expected, rtol=1e-4, atol=1e-9)


def test_warm_up_stable_decay_reaches_its_final_fraction_after_the_last_step() -> None:
    schedule = build_schedule(WarmupStableDecay(learning_rate=1.0, warmup_steps=4, decay_steps=10, final_fraction=0.2), 100)
    found = [round(float(schedule(step)), 4) for step in (0, 3, 4, 90, 95, 100, 120)]
    assert found == [0.25, 1.0, 1.0, 1.0, 0.6, 0.2, 0.2]


def test_step_zero_of_a_warm_up_already_learns() -> None:
    assert float(build_schedule(Constant(learning_rate=0.5, warmup_steps=10), 20)(0)) == pytest.approx(0.05)
