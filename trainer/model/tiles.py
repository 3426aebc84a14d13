"""The head and the loss in tiles of a sequence, so that logits exist of one tile at a time.

B sequences, T tokens, n tiles of t tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from trainer.config.optimizer import Loss
from trainer.loss import LossSums, loss_sums
from trainer.model.transformer import Transformer
from trainer.parallel.shards import sum_over_batch_shards

Sums = tuple[jax.Array, jax.Array, jax.Array]
"""Cross-entropy, z-loss, tokens."""


def tiled_loss_sums(model: Transformer, x_BTD: jax.Array, batch: Mapping[str, jax.Array], config: Loss) -> LossSums:
    """What `loss_sums` returns of the logits of `x`, the model's hidden states, without holding them.

    The backward pass computes the logits of a tile again: one more product with the head. Gradients of the head add up in
    float32 over the tiles of a device, then over devices.
    """
    kernel, axes, path = model.head_kernel()
    rows = [x_BTD, *(batch[name] for name in ("targets", "weights", "segments"))]

    def local(kernel: jax.Array, *rows: jax.Array) -> Sums:
        wide = kernel.astype(jnp.float32)

        @jax.checkpoint
        def sums(wide: jax.Array, tile: list[jax.Array]) -> Sums:
            x_BtD, targets_Bt, weights_Bt, segments_Bt = tile
            found = loss_sums(model.project(x_BtD, segments_Bt, wide.astype(kernel.dtype)), targets_Bt, weights_Bt, config)
            return found.cross_entropy, found.z_loss, found.tokens

        def add(total: Sums, tile: list[jax.Array]) -> tuple[Sums, None]:
            return jax.tree.map(jnp.add, total, sums(wide, tile)), None

        total, _ = jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(()), jnp.zeros(())), [_tiles(array, config.tiles) for array in rows])
        return total

    return LossSums(*sum_over_batch_shards(local, kernel, axes, path, rows, ("batch", "length")))


def _tiles(x: jax.Array, tiles: int) -> jax.Array:
    """[B, T, ...] -> [n, B, t, ...]."""
    return x.reshape(x.shape[0], tiles, x.shape[1] // tiles, *x.shape[2:]).swapaxes(0, 1)
