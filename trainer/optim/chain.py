"""The optimizer chain: clip, precondition, decay, scale."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import optax

from trainer.config.optimizer import Optimizer


def build_optimizer(config: Optimizer, schedule: optax.Schedule, decays: Sequence[bool]) -> optax.GradientTransformation:
    """The optax chain of `config`. `decays` says, in the order of the parameter leaves, which of them weight decay touches."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm is not None else optax.identity(),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon),
        _decayed_weights(config.weight_decay, decays),
        optax.scale_by_learning_rate(schedule),
    )


def _decayed_weights(rate: float, decays: Sequence[bool]) -> optax.GradientTransformation:
    """Add `rate` times the parameter to the update of every leaf that decays (optax's masks need equal tree types; order does not)."""

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None) -> tuple[optax.Updates, optax.OptState]:
        leaves, tree = jax.tree.flatten(updates)
        weights = jax.tree.leaves(params)
        decayed = [
            leaf + rate * weight if decay else leaf for leaf, weight, decay in zip(leaves, weights, decays, strict=True)
        ]
        return jax.tree.unflatten(tree, decayed), state

    if rate == 0:
        return optax.identity()
    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
