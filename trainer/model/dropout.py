"""Dropout whose masks depend on the run's key, the step, the layer and a token's place in the global batch, on nothing else.

So they are the same for every mesh, accumulation, layer form and remat policy, recomputed instead of stored, and a resumed
run draws those an uninterrupted one would have drawn: there is no stream that has to advance.

B sequences, T tokens, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import jax
import jax.numpy as jnp

Site = Literal["embedding", "attention", "mlp"]
SITES: Final[tuple[Site, ...]] = ("embedding", "attention", "mlp")
STREAM: Final = 1
"""What sets these keys apart from others of the run's key."""


def token_noise(key: jax.Array, step: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """A random number of each token of a whole global batch, uint32 [B, T].

    key: threefry key data, uint32 [2]; step: int32 scalar. A token is known by its row, document and position, not by where
    in the row it is stored.
    """
    base = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), STREAM), step)

    def one(row: jax.Array, segment: jax.Array, position: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(base, row), segment), position)
        return jax.random.bits(own, (), jnp.uint32)

    rows_BT = jax.lax.broadcasted_iota(jnp.int32, positions_BT.shape, 0)
    return jax.vmap(jax.vmap(one))(rows_BT, segments_BT, positions_BT)


@dataclass(frozen=True)
class Dropout:
    rate: float
    noise: jax.Array  # uint32 [B, T]: what `token_noise` gives
    layer: jax.Array | int = 0
    """Counted over the whole model."""

    def __call__(self, x_BTD: jax.Array, site: Site) -> jax.Array:
        """`x` with the share `rate` of its elements zero and the others scaled so that the mean stays; in its dtype."""
        word = jnp.asarray(self.layer, jnp.uint32) * len(SITES) + SITES.index(site)

        def bits(noise: jax.Array) -> jax.Array:
            key = jax.random.wrap_key_data(jnp.stack([noise, word]), impl="threefry2x32")
            return jax.random.bits(key, x_BTD.shape[-1:], jnp.uint32)

        kept_BTD = jax.vmap(jax.vmap(bits))(self.noise) >= jnp.uint32(round(self.rate * 2**32))
        return jnp.where(kept_BTD, x_BTD * jnp.asarray(1 / (1 - self.rate), x_BTD.dtype), 0)
