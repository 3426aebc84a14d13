"""Attention over sequences that are split over the mesh: what `trainer.model.attend.attend` gives, by the method of the run.

B sequences, T tokens of a device, S of a whole row, N query heads, K key/value heads, H head dim, V dims of a value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from trainer.config.context import Gather, Ring, Ulysses
from trainer.config.model import AttentionKernel
from trainer.model.attend import Rows, attend, attention_mask
from trainer.model.blockwise import block_visit
from trainer.model.kernels import HEADS, keys_beside_queries, make_kernel, run_kernel, uses_splash, whole_rows
from trainer.model.ring_kernel import splash_visit
from trainer.parallel.context import Split, heads_to_tokens, tokens_to_heads
from trainer.parallel.ring import Part, ring_attention
from trainer.parallel.sharding import current_layout
from trainer.parallel.shards import Axes, map_shards, spec_of_dim


@dataclass(frozen=True)
class _Form:
    """What all methods are told about one block's attention."""

    split: Split
    window: int | None
    soft_cap: float | None
    splash: bool


def attend_split(
    query_BTNH: jax.Array,
    key_BTKH: jax.Array,
    value_BTKV: jax.Array,
    rows: Rows,
    split: Split,
    *,
    axes: tuple[Axes, Axes],
    window: int | None,
    soft_cap: float | None,
    sinks_N: jax.Array | None,
    kernel: AttentionKernel,
) -> jax.Array:
    """[B, T, N, V] of whole arrays, laid out as the queries are. Queries come scaled; rows: positions and segments.

    axes: logical axes of queries, and of keys and values. Every device computes for its sequences, heads and tokens; Ulysses
    in the middle of it for some heads of all tokens. Masks are made of positions and segments, or, in the kernel, of places in
    the row, as `split` knows them.
    """
    layout = current_layout()
    assert layout is not None
    key_BTKH, value_BTKV, key_axes = keys_beside_queries(query_BTNH, key_BTKH, value_BTKV, axes)
    query_axes, length = axes[0], query_BTNH.shape[1]
    arrays = [query_BTNH, key_BTKH, value_BTKV, *rows, sinks_N]
    names = [query_axes, key_axes, key_axes, query_axes[:HEADS], query_axes[:HEADS], spec_of_dim(query_axes, query_BTNH.shape, HEADS)]
    local_heads = layout.sharding(query_axes, query_BTNH.shape).shard_shape(query_BTNH.shape)[HEADS]
    match layout.sharding_config.context:
        case Ulysses() if local_heads % split.ways == 0:
            form = _Form(split, window, soft_cap, uses_splash(kernel, length))
            return map_shards(partial(_by_heads, form), arrays, names, like=0)
        case Ring():
            form = _Form(split, window, soft_cap, window is None and uses_splash(kernel, length // split.chunks))
            return map_shards(partial(_in_a_ring, form), arrays, names, like=0)
        case Gather() | Ulysses():  # the second on a mesh that was not checked, as in decoding
            form = _Form(split, window, soft_cap, uses_splash(kernel, length // split.chunks))
            if not form.splash:
                return map_shards(partial(_gathered, form), arrays, names, like=0)
            chunk, places = length // split.chunks, split.places(length)
            made = make_kernel(places, length, local_heads, chunk=chunk, shards=split.ways, window=window, soft_cap=soft_cap)
            return map_shards(partial(_gathered_splash, form), arrays, names, like=0, more=(made, split.kernel_specs(made)))


def _gathered(
    form: _Form, query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array, segments: jax.Array, sinks_N: jax.Array | None
) -> jax.Array:
    """The mask is made of positions, so the order of the keys does not matter."""
    plain = replace(form.split, balanced=False)
    keys, values, *rows_BS = (plain.gather(array) for array in (key, value, positions, segments))
    mask_BTS = attention_mask((positions, segments), (rows_BS[0], rows_BS[1]), form.window)
    return attend(query, keys, values, mask_BTS, soft_cap=form.soft_cap, sinks_N=sinks_N)


def _gathered_splash(
    form: _Form,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    sinks_N: jax.Array | None,
    kernel: Any,
) -> jax.Array:
    """The kernel's mask is made of places in the row: keys are brought in order, queries lie where `Split.places` says."""
    del positions
    keys, values, segments_BS = (form.split.gather(array) for array in (key, value, segments))
    return run_kernel(kernel, query, keys, values, (segments, segments_BS), sinks_N)


def _by_heads(
    form: _Form, query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array, segments: jax.Array, sinks_N: jax.Array | None
) -> jax.Array:
    """Ulysses: all tokens for some of the heads."""
    split = form.split
    queries, keys, values = (tokens_to_heads(array, split) for array in (query, key, value))
    rows_BS = split.gather(positions), split.gather(segments)
    if sinks_N is not None:
        own = queries.shape[HEADS]
        sinks_N = jax.lax.dynamic_slice_in_dim(sinks_N, jax.lax.axis_index(split.axes) * own, own)
    if form.splash:
        mixed = whole_rows(queries, keys, values, rows_BS[1], sinks_N, window=form.window, soft_cap=form.soft_cap)
    else:
        mixed = attend(queries, keys, values, attention_mask(rows_BS, rows_BS, form.window), soft_cap=form.soft_cap, sinks_N=sinks_N)
    return heads_to_tokens(mixed, split)


def _in_a_ring(
    form: _Form, query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array, segments: jax.Array, sinks_N: jax.Array | None
) -> jax.Array:
    """The kernel takes no window here: what a window hides changes with the way a part has come."""
    chunk = query.shape[1] // (2 if form.split.balanced else 1)
    if form.splash:
        visit = splash_visit(query.shape[1], query.shape[HEADS], balanced=form.split.balanced, soft_cap=form.soft_cap)
    else:
        visit = block_visit(chunk, form.window, form.soft_cap)
    part = Part(key.swapaxes(1, 2), value.swapaxes(1, 2), jnp.stack([positions, segments], axis=1))
    return ring_attention(query.swapaxes(1, 2), part, sinks_N, split=form.split, visit=visit).swapaxes(1, 2)
