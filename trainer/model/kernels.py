"""Attention by the splash kernel (Pallas, TPU): scores never leave the chip's fast memory, masked blocks are skipped.

B sequences, T query tokens, S key tokens, N query heads = K key/value heads x G queries each, H head dim, V dims of a value.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Final, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from trainer.config.attention import KERNEL_BLOCK
from trainer.config.model import AttentionKernel
from trainer.parallel.shards import Axes, map_shards, mesh_axes_of, on_tpu, spec_of_dim

LARGEST_BLOCK: Final = 512
HEADS: Final = 2
"""The dim of heads in queries, keys and values."""


def uses_splash(kernel: AttentionKernel, tokens: int) -> bool:
    """Whether attention runs the kernel: where it is asked for, and by itself (`auto`) on TPUs where it can.

    tokens: of a row, or of a chunk of it where its chunks lie in another order.
    """
    return kernel == "splash" if kernel != "auto" else on_tpu() and tokens % KERNEL_BLOCK == 0


def splash_attention(
    query_BTNH: jax.Array,
    key_BTKH: jax.Array,
    value_BTKV: jax.Array,
    segments_BT: jax.Array,
    *,
    axes: tuple[Axes, Axes],
    window: int | None,
    soft_cap: float | None,
    sinks_N: jax.Array | None,
) -> jax.Array:
    """What `trainer.model.attend.attend` returns for documents that lie one after another in their row: [B, T, N, V].

    Queries come scaled. axes: logical axes of queries, and of keys and values. A device computes the heads and sequences
    it holds; the mask is made of places in the row and `segments`. Not on a TPU, the kernel is interpreted.
    """
    key_BTKH, value_BTKV, key_axes = keys_beside_queries(query_BTNH, key_BTKH, value_BTKV, axes)
    query_axes, _ = axes
    local = partial(whole_rows, window=window, soft_cap=soft_cap)
    arrays = [query_BTNH, key_BTKH, value_BTKV, segments_BT, sinks_N]
    return map_shards(
        local, arrays, [query_axes, key_axes, key_axes, query_axes[:HEADS], spec_of_dim(query_axes, query_BTNH.shape, HEADS)], like=0
    )


def keys_beside_queries(
    query_BTNH: jax.Array, key_BTKH: jax.Array, value_BTKV: jax.Array, axes: tuple[Axes, Axes]
) -> tuple[jax.Array, jax.Array, Axes]:
    """Keys and values of which each device has those of its query heads, and their logical axes.

    Where there are fewer key heads than ways the heads are split, each query head takes its key along.
    """
    query_axes, key_axes = axes
    if mesh_axes_of(key_axes, key_BTKH.shape, HEADS) == mesh_axes_of(query_axes, query_BTNH.shape, HEADS):
        return key_BTKH, value_BTKV, key_axes
    group = query_BTNH.shape[HEADS] // key_BTKH.shape[HEADS]
    return jnp.repeat(key_BTKH, group, axis=HEADS), jnp.repeat(value_BTKV, group, axis=HEADS), query_axes


def whole_rows(
    query_BTNH: jax.Array,
    key_BTKH: jax.Array,
    value_BTKV: jax.Array,
    segments_BT: jax.Array,
    sinks_N: jax.Array | None,
    *,
    window: int | None,
    soft_cap: float | None,
) -> jax.Array:
    """`splash_attention` of what one device has: whole rows, in order."""
    _, T, N, _ = query_BTNH.shape
    kernel = make_kernel(np.arange(T, dtype=np.int32), T, N, chunk=T, window=window, soft_cap=soft_cap)
    return run_kernel(kernel, query_BTNH, key_BTKH, value_BTKV, (segments_BT, segments_BT), sinks_N)


def run_kernel(
    kernel: Any,
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKV: jax.Array,
    segments: tuple[jax.Array, jax.Array],
    sinks_N: jax.Array | None,
) -> jax.Array:
    """[B, T, N, V]. kernel: what `make_kernel` gives, or a device's part of it; segments: int32 of queries [B, T], of keys [B, S]."""
    heads_first = [array.swapaxes(1, 2) for array in (query_BTNH, key_BSKH, value_BSKV)]
    run = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))
    return cast("jax.Array", run(*heads_first, splash.SegmentIds(*segments), sinks_N)).swapaxes(1, 2)


def make_kernel(
    places: np.ndarray,
    keys: int,
    heads: int,
    *,
    chunk: int,
    shards: int = 1,
    window: int | None = None,
    soft_cap: float | None = None,
    causal: bool = True,
    residuals: bool = False,
) -> Any:
    """The kernel for queries at `places` of a row, int32 [T], and keys at 0 ... keys - 1; interpreted where there is no TPU.

    chunk: so many queries lie in order, from every multiple of it. shards: devices that the queries are split over, each with
    its part of the kernel (a tree of arrays). causal: False where every query sees every key of its document. residuals: the
    logarithm of the softmax's denominator is returned beside the result, without a gradient.
    """
    block_q, block_kv = largest_block(chunk), largest_block(keys)
    mask = PlacedMask(places, keys, window) if causal else _NoMask(len(places), keys)
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q, block_kv=block_kv, block_q_dkv=block_q, block_kv_dkv=block_kv, block_q_dq=block_q, block_kv_dq=block_kv
        ),
        head_shards=1,
        q_seq_shards=shards,
        save_residuals=residuals,
        attn_logits_soft_cap=soft_cap,
        interpret=not on_tpu(),
    )


def largest_block(tokens: int) -> int:
    return next(size for size in range(LARGEST_BLOCK, 0, -KERNEL_BLOCK) if tokens % size == 0)


@lru_cache(maxsize=64)  # the kernel is compiled anew for every other function
def _seen(window: int | None) -> Callable[[Any, Any], Any]:
    """Whether a query at a place sees a key at another one."""
    if window is None:
        return lambda query, key: query >= key
    return lambda query, key: (query >= key) & (query < key + window)


class PlacedMask(masks.Mask):
    """The causal mask of queries that lie anywhere in the row, of keys in order.

    The library looks at every block of a mask; it asks of most of them only whether any or all of it is seen, which the
    ends of the block tell, so such a block is one element (a row of 131,072 tokens has 65,536 blocks).
    """

    def __init__(self, places: np.ndarray, keys: int, window: int | None) -> None:
        self.q_sequence, self.mask_function = places, _seen(window)
        self._keys, self._window = keys, window

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.q_sequence), self._keys

    def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
        queries, keys = self.q_sequence[idx[0]], np.arange(idx[1].start, idx[1].stop, dtype=np.int32)
        first, last = queries.min(), queries.max()
        reach = len(self.q_sequence) + self._keys if self._window is None else self._window
        if last < keys[0] or first - keys[-1] >= reach:
            return np.zeros((1, 1), np.bool_)
        if first >= keys[-1] and last - keys[0] < reach:
            return np.ones((1, 1), np.bool_)
        return self.mask_function(queries[:, None], keys[None, :])

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, PlacedMask) and self.shape == other.shape and self._window == other._window
        return same and np.array_equal(self.q_sequence, cast("PlacedMask", other).q_sequence)

    def __hash__(self) -> int:
        return hash((self.shape, self._window, self.q_sequence.tobytes()))


class _NoMask(masks.Mask):
    """Every query sees every key."""

    def __init__(self, queries: int, keys: int) -> None:
        self._shape = queries, keys

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
        return np.ones((1, 1), np.bool_)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _NoMask) and self._shape == other._shape

    def __hash__(self) -> int:
        return hash(self._shape)
