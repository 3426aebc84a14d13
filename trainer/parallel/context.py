"""Sequences that are split over the mesh: their order, and how the parts come together. It knows no model.

B sequences, T tokens of a device or of a whole row, N heads, H dims of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from trainer.config.context import balanced_order, repeated_key_heads
from trainer.parallel.sharding import constrain, current_layout
from trainer.parallel.shards import Axes, mesh_axes_of

LENGTH = 1
"""The dim of tokens in activations."""


@dataclass(frozen=True)
class Split:
    """A sequence over mesh axes."""

    axes: tuple[str, ...]
    ways: int
    balanced: bool

    @property
    def chunks(self) -> int:
        """Parts of a row that lie anywhere, each in order."""
        return 2 * self.ways if self.balanced else self.ways

    def places(self, length: int) -> np.ndarray:
        """The place in the row of each token as it is stored, int32 [length]."""
        order = balanced_order(self.ways) if self.balanced else range(self.ways)
        return np.arange(length, dtype=np.int32).reshape(self.chunks, -1)[list(order)].reshape(-1)

    def kernel_specs(self, kernel: Any) -> Any:
        """PartitionSpecs of a splash kernel whose queries are split: each device has its part of the mask."""
        layout = current_layout()
        assert layout is not None
        return kernel.manual_sharding_spec(NamedSharding(layout.mesh, PartitionSpec(None, self.axes)))

    def gather(self, x: jax.Array) -> jax.Array:
        """Within `shard_map`: the whole rows in their own order, of what devices hold of them [B, T, ...]."""
        return self.in_order(jax.lax.all_gather(x, self.axes, axis=LENGTH, tiled=True))

    def in_order(self, x: jax.Array) -> jax.Array:
        """Whole rows [B, T, ...] as they are stored in their own order."""
        return _reordered(x, np.argsort(balanced_order(self.ways))) if self.balanced else x

    def as_stored(self, x: jax.Array) -> jax.Array:
        """The inverse of `in_order`."""
        return _reordered(x, np.array(balanced_order(self.ways))) if self.balanced else x


def split_of(axes: Axes, shape: Sequence[int]) -> Split | None:
    """How the second dim of an array with these logical axes is split; None where it is whole."""
    layout, names = current_layout(), mesh_axes_of(axes, shape, LENGTH)
    if layout is None or not names:
        return None
    return Split(names, int(np.prod([layout.mesh.shape[name] for name in names])), layout.balanced)


def in_order(x: jax.Array) -> jax.Array:
    """Rows [B, T, ...] of a step as they are stored -> in their own order."""
    split = split_of(("batch", "length"), x.shape[:2])
    return x if split is None else split.in_order(x)


def as_stored(x: jax.Array) -> jax.Array:
    """Rows [B, T, ...] in their own order -> as a step stores them, laid out as its batch is."""
    split = split_of(("batch", "length"), x.shape[:2])
    return x if split is None or not split.balanced else constrain(split.as_stored(x), ("batch", "length", *[None] * (x.ndim - 2)))


def balance(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """All arrays [B, T] of a batch, which comes in order, as the step stores them. What the model computes of them is by token,
    by position and by document, so that nothing else has to know; what is not, takes `in_order` and `as_stored`.
    """
    return {name: as_stored(x) for name, x in batch.items()}


def tokens_to_heads(x_BTNH: jax.Array, split: Split) -> jax.Array:
    """Within `shard_map`: [B, T, N, H] of a device's tokens -> the same of all tokens for its part of the heads.

    Heads that are too few are repeated, each as often as all others, next to itself.
    """
    repeat = repeated_key_heads(split.ways, x_BTNH.shape[2])
    x_BTNH = jnp.repeat(x_BTNH, repeat, axis=2) if repeat > 1 else x_BTNH
    return jax.lax.all_to_all(x_BTNH, split.axes, split_axis=2, concat_axis=LENGTH, tiled=True)


def heads_to_tokens(x_BTNH: jax.Array, split: Split) -> jax.Array:
    """The inverse of `tokens_to_heads`, of heads that were not repeated."""
    return jax.lax.all_to_all(x_BTNH, split.axes, split_axis=LENGTH, concat_axis=2, tiled=True)


def _reordered(x: jax.Array, order: np.ndarray) -> jax.Array:
    rows, length = x.shape[:2]
    return x.reshape(rows, len(order), length // len(order), *x.shape[2:])[:, order].reshape(x.shape)
