"""The loss: sums over valid tokens, divided once per optimizer step by the global count of valid tokens.

B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from trainer.config.optimizer import Loss
from trainer.config.terms import Count, Term

_NO_SUMS: Final[dict[Any, jax.Array]] = {}


class LossSums(NamedTuple):
    """Float32 scalars, summed over valid tokens; sums of microbatches add up to those of the batch."""

    cross_entropy: jax.Array
    z_loss: jax.Array  # already weighted
    tokens: jax.Array  # valid tokens
    terms: dict[str, jax.Array] = _NO_SUMS  # the model's terms by name, not weighted
    counts: dict[Count, jax.Array] = _NO_SUMS  # what else terms are divided by

    @classmethod
    def zero(cls, terms: Sequence[Term] = ()) -> LossSums:
        """`terms`: the model's."""

        def scalar() -> jax.Array:
            return jnp.zeros((), jnp.float32)

        counts: dict[Count, jax.Array] = {term.counts: scalar() for term in terms if term.counts != "tokens"}
        return cls(scalar(), scalar(), scalar(), {term.name: scalar() for term in terms}, counts)

    def __add__(self, other: LossSums) -> LossSums:  # type: ignore[override]
        return jax.tree.map(jnp.add, self, other)

    @property
    def total(self) -> jax.Array:
        """What the head adds to the loss, before division by its tokens."""
        return self.cross_entropy + self.z_loss


def loss_sums(logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, config: Loss) -> LossSums:
    """Sums of -log softmax(logits)[target] and of the z-loss over the positions whose weight is not 0.

    logits float32, targets int32, weights float32 (0 or 1). The z-loss term is `weight * log(Z)^2`
    (Chowdhery et al. 2022). Positions that do not count are selected away, in the values and in the gradient,
    so that neither a NaN nor an invalid id there reaches the sums or a parameter.
    """
    valid_BT = weights_BT > 0
    cross_entropy, z_loss = _sums(logits_BTV, jnp.where(valid_BT, targets_BT, 0), valid_BT, config.z_loss_weight)
    return LossSums(cross_entropy, z_loss, jnp.sum(valid_BT, dtype=jnp.float32))


# The gradient by hand: derived step by step it passes seven times over the logits, the largest array of a step; so, twice.
@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sums(logits_BTV: jax.Array, targets_BT: jax.Array, valid_BT: jax.Array, z_weight: float) -> tuple[jax.Array, jax.Array]:
    return _forward(logits_BTV, targets_BT, valid_BT, z_weight)[0]


def _forward(
    logits_BTV: jax.Array, targets_BT: jax.Array, valid_BT: jax.Array, z_weight: float
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    cross_entropy = jnp.sum(jnp.where(valid_BT, log_z_BT - target_BT, 0))
    z_loss = jnp.sum(jnp.where(valid_BT, z_weight * jnp.square(log_z_BT), 0)) if z_weight else jnp.zeros(())
    return (cross_entropy, z_loss), (logits_BTV, targets_BT, valid_BT, log_z_BT)


def _backward(z_weight: float, residuals: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None, None]:
    """d/dlogits = softmax * (c + 2 z weight log Z) - c at the target, for the cotangents c and z of the two sums."""
    logits_BTV, targets_BT, valid_BT, log_z_BT = residuals
    c, z = cotangents
    scale_BT = c + 2 * z * z_weight * log_z_BT if z_weight else jnp.broadcast_to(c, log_z_BT.shape)
    hit_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2) == targets_BT[..., None]
    gradient_BTV = jnp.exp(logits_BTV - log_z_BT[..., None]) * scale_BT[..., None] - jnp.where(hit_BTV, c, 0)
    return jnp.where(valid_BT[..., None], gradient_BTV, 0), None, None


_sums.defvjp(_forward, _backward)
