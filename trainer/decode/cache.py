"""What the layers remember of the tokens in every slot: shapes, layout over the mesh, masks, writing.

R repeats (only where layers are stacked), B slots, T new tokens, S entries of a layer's cache.

A token at position p is kept in entry p mod S. A layer with a window has S = window entries and so forgets by itself;
any other has one for every position. Which position an entry holds follows from the number of tokens in the slot, so
nothing but keys and values is stored, and a new request needs no cleaning: entries it has not written are masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import jax
import jax.numpy as jnp

from trainer.config.model import Model
from trainer.parallel.sharding import Layout

Caches = list[Any]
"""As `Transformer.forward` takes them: by segment (unrolled: by repeat), by position in the pattern, by name."""

AXES: Final[dict[str, tuple[str | None, ...]]] = {
    "key": ("batch", None, "act_kv_heads", None),
    "value": ("batch", None, "act_kv_heads", None),
    "latent": ("batch", None, None),
    "rotated": ("batch", None, None),
}
"""Logical axes of what attention remembers, by name, without the dim of stacked layers."""


def capacity(window: int | None, length: int, further: int = 0) -> int:
    """Entries a layer needs for sequences of at most `length` tokens: a query sees window - 1 tokens before itself.

    further: tokens a step may keep that turn out not to be in the sequence. They must not take the place of one that is seen.
    """
    return length if window is None else max(min(window - 1 + further, length), 1)


def capacities(model: Model, length: int, further: int = 0) -> Caches:
    """Entries of every layer's cache, in the structure of the caches."""
    by_segment = [[capacity(block.attention.window, length, further) for block in segment.pattern] for segment in model.segments]
    if model.layers == "scan":
        return by_segment
    return [[sizes] * segment.repeats for sizes, segment in zip(by_segment, model.segments, strict=True)]


def remembered(products: list[Any]) -> Caches:
    """The caches among the by-products of a forward pass."""
    return jax.tree.map(lambda product: product["cache"], products, is_leaf=lambda node: isinstance(node, dict))


def describe(model: Model, remember: Callable[[], Caches], *, length: int, layout: Layout, further: int = 0) -> Caches:
    """The caches without values: shapes, dtypes and shardings.

    remember: gives what the layers remember of one token in each slot, [(R,) B, 1, ...]; it is only traced.
    """

    def entry(size: int, cache: Any) -> Any:
        return {name: leaf(name, size, one) for name, one in cache.items()}

    def leaf(name: str, size: int, one: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dims = stacked_dims(model)
        shape = (*one.shape[: dims + 1], size, *one.shape[dims + 2 :])
        axes = (*[None] * dims, *AXES[name])
        return jax.ShapeDtypeStruct(shape, one.dtype, sharding=layout.sharding(axes, shape))

    return jax.tree.map(entry, capacities(model, length, further), jax.eval_shape(remember))


def stacked_dims(model: Model) -> int:
    """Dims before the slots in every leaf."""
    return int(model.layers == "scan")


def held_positions(counts_B: jax.Array, size: int) -> jax.Array:
    """The position of the token in each of `size` entries, int32 [B, S]; negative where there is none.

    counts: tokens the slot has had so far.
    """
    last_B1 = counts_B[:, None] - 1
    return last_B1 - (last_B1 - jnp.arange(size, dtype=jnp.int32)[None, :]) % size


def past_masks(
    windows: Iterable[int | None], positions_BT: jax.Array, counts_B: jax.Array, *, length: int, further: int = 0
) -> dict[int | None, jax.Array]:
    """window -> bool [B, T, S]: the query at a position may see the entry."""
    masks: dict[int | None, jax.Array] = {}
    for window in dict.fromkeys(windows):
        held_BS = held_positions(counts_B, capacity(window, length, further))
        mask_BTS = jnp.broadcast_to(held_BS[:, None, :] >= 0, (*positions_BT.shape, held_BS.shape[1]))
        if window is not None:
            mask_BTS &= positions_BT[:, :, None] - held_BS[:, None, :] < window
        masks[window] = mask_BTS
    return masks


def append(model: Model, caches: Caches, new: Caches, counts_B: jax.Array) -> Caches:
    """The caches with T new tokens in every slot, `counts` before them; `new` is [(R,) B, T, ...]."""

    def write(cache_BS: jax.Array, new_BT: jax.Array) -> jax.Array:
        one_slot = jax.vmap(lambda cache, new, entry: jax.lax.dynamic_update_slice_in_dim(cache, new, entry, 0))

        def all_slots(cache_BS: jax.Array, new_BT: jax.Array) -> jax.Array:
            for t in range(new_BT.shape[1]):  # one by one: a cache may end between two of them
                cache_BS = one_slot(cache_BS, new_BT[:, t : t + 1], (counts_B + t) % cache_BS.shape[1])
            return cache_BS

        return jax.vmap(all_slots)(cache_BS, new_BT) if stacked_dims(model) else all_slots(cache_BS, new_BT)

    return jax.tree.map(write, caches, new)


def arrange(model: Model, new: Caches, count: jax.Array, *, length: int, further: int = 0) -> Caches:
    """What a slot holds after the first `count` of T tokens from the beginning: `new` [(R,) 1, T, ...] becomes [(R,) 1, S, ...]."""
    dim = stacked_dims(model) + 1

    def entries(size: int, cache: Any) -> Any:
        held_S = held_positions(count[None], size)[0]
        return {name: pick(leaf, held_S) for name, leaf in cache.items()}

    def pick(leaf: jax.Array, held_S: jax.Array) -> jax.Array:
        kept = jnp.take(leaf, jnp.maximum(held_S, 0), axis=dim, mode="clip")
        there = jnp.expand_dims(held_S >= 0, [axis for axis in range(leaf.ndim) if axis != dim])
        return jnp.where(there, kept, jnp.zeros((), leaf.dtype))

    return jax.tree.map(entries, capacities(model, length, further), new)


def insert(model: Model, caches: Caches, row: Caches, slot: jax.Array) -> Caches:
    """The caches with all of one slot replaced by `row` [(R,) 1, S, ...]."""
    dim = stacked_dims(model)
    return jax.tree.map(lambda cache, one: jax.lax.dynamic_update_slice_in_dim(cache, one, slot, dim), caches, row)
