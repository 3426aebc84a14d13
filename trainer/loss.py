"""The loss: sums over valid tokens, divided once per optimizer step by the global count of valid tokens.

B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from trainer.config.optimizer import Loss


class LossSums(NamedTuple):
    """Float32 scalars, summed over valid tokens; sums of microbatches add up to those of the batch."""

    cross_entropy: jax.Array
    z_loss: jax.Array  # already weighted
    tokens: jax.Array  # valid tokens

    @classmethod
    def zero(cls) -> LossSums:
        return cls(*(jnp.zeros((), jnp.float32) for _ in cls._fields))

    def __add__(self, other: LossSums) -> LossSums:  # type: ignore[override]
        return LossSums(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def total(self) -> jax.Array:
        return self.cross_entropy + self.z_loss


def loss_sums(logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, config: Loss) -> LossSums:
    """Sums of -log softmax(logits)[target] and of the z-loss over the positions whose weight is not 0.

    logits float32, targets int32, weights float32 (0 or 1). The z-loss term is `weight * log(Z)^2`
    (Chowdhery et al. 2022). Positions that do not count are selected away, so that neither a NaN nor an
    invalid id there reaches the sums or a gradient.
    """
    valid_BT = weights_BT > 0
    logits_BTV = jnp.where(valid_BT[..., None], logits_BTV, 0)
    targets_BT = jnp.where(valid_BT, targets_BT, 0)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    cross_entropy = jnp.sum(jnp.where(valid_BT, log_z_BT - target_BT, 0))
    z_loss = jnp.sum(jnp.where(valid_BT, config.z_loss_weight * jnp.square(log_z_BT), 0)) if config.z_loss_weight else jnp.zeros(())
    return LossSums(cross_entropy, z_loss, jnp.sum(valid_BT, dtype=jnp.float32))
