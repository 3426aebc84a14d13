"""The loss and its hand-written gradient against plain differentiation; what padding holds never matters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.config.optimizer import Loss
from trainer.loss import loss_sums

B, T, V = 3, 5, 11


def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    random = np.random.default_rng(1)
    weights = np.ones((B, T), np.float32)
    weights[1, 2:] = 0
    return (
        jnp.asarray(random.normal(size=(B, T, V)) * 3, jnp.float32),
        jnp.asarray(random.integers(0, V, (B, T)), jnp.int32),
        jnp.asarray(weights),
    )


def plain(logits: jax.Array, targets: jax.Array, weights: jax.Array, z_weight: float) -> jax.Array:
    """By the definition, on one-hot targets, in float64's place: log-softmax."""
    log_probabilities = jax.nn.log_softmax(logits)
    cross_entropy = -jnp.sum(jax.nn.one_hot(targets, V) * log_probabilities, axis=-1)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return jnp.sum(weights * (cross_entropy + z_weight * log_z**2))


@pytest.mark.parametrize("z_weight", [0.0, 0.1])
def test_value_and_gradient_equal_plain_differentiation(z_weight: float) -> None:
    logits, targets, weights = inputs()
    ours = jax.value_and_grad(lambda x: loss_sums(x, targets, weights, Loss(z_loss_weight=z_weight)).total * 0.3)(logits)
    theirs = jax.value_and_grad(lambda x: plain(x, targets, weights, z_weight) * 0.3)(logits)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5, atol=1e-7)
    assert float(loss_sums(logits, targets, weights, Loss()).tokens) == B * T - 3


def test_nan_logits_and_invalid_targets_where_nothing_counts_reach_neither_value_nor_gradient() -> None:
    logits, targets, weights = inputs()
    dirty_logits = logits.at[1, 3].set(jnp.nan)
    dirty_targets = targets.at[1, 3].set(V + 1000).at[1, 4].set(-7)
    loss = Loss(z_loss_weight=0.1)
    clean = jax.value_and_grad(lambda x: loss_sums(x, targets, weights, loss).total)(logits)
    dirty = jax.value_and_grad(lambda x: loss_sums(x, dirty_targets, weights, loss).total)(dirty_logits)
    np.testing.assert_array_equal(clean[0], dirty[0])
    np.testing.assert_array_equal(clean[1], dirty[1])
