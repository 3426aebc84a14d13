"""Optimizers as optax transformations."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from trainer.config.optimizer import Optimizer


def build_optimizer(config: Optimizer, schedule: optax.Schedule, decays: Sequence[bool]) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (Loshchilov and Hutter 2019). `decays`: which parameter leaves weight decay touches, in order.

    The arithmetic of `optax.adamw` behind `optax.clip_by_global_norm`, with every expression per element a
    multiplication: divisions by a norm or a bias correction are not fused into the three updates but written out.
    """

    def init(params: optax.Params) -> optax.OptState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(count=jnp.zeros((), jnp.int32), mu=zeros, nu=jax.tree.map(jnp.zeros_like, params))

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None) -> tuple[optax.Updates, optax.OptState]:
        assert isinstance(state, optax.ScaleByAdamState)
        count = jnp.asarray(optax.safe_increment(state.count), jnp.int32)
        clip = jnp.minimum(1, config.clip_norm / optax.tree.norm(updates)) if config.clip_norm is not None else jnp.float32(1)
        first = 1 / (1 - config.b1 ** count.astype(jnp.float32))
        second = 1 / (1 - config.b2 ** count.astype(jnp.float32))
        rate = jnp.asarray(schedule(state.count))
        gradients, tree = jax.tree.flatten(jax.tree.map(lambda g: g * clip, updates))
        mu = [config.b1 * m + (1 - config.b1) * g for m, g in zip(jax.tree.leaves(state.mu), gradients, strict=True)]
        nu = [config.b2 * v + (1 - config.b2) * (g * g) for v, g in zip(jax.tree.leaves(state.nu), gradients, strict=True)]
        steps = [
            -rate * ((m * first) / (jnp.sqrt(v * second) + config.epsilon) + (config.weight_decay * p if decay else 0))
            for m, v, p, decay in zip(mu, nu, jax.tree.leaves(params), decays, strict=True)
        ]
        return tree.unflatten(steps), optax.ScaleByAdamState(count=count, mu=tree.unflatten(mu), nu=tree.unflatten(nu))

    return optax.GradientTransformation(init, update)
