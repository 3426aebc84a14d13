"""Attention by the splash kernel (Pallas, TPU): scores never leave the chip's fast memory, masked blocks are skipped.

B sequences, T tokens, N query heads = K key/value heads x G queries each, H head dim, V dims of a value.
"""

from __future__ import annotations

from functools import partial
from typing import Final, cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from trainer.config.attention import KERNEL_BLOCK
from trainer.config.model import AttentionKernel
from trainer.parallel.shards import Axes, map_shards, mesh_axes_of, on_tpu

LARGEST_BLOCK: Final = 512
HEADS: Final = 2
"""The dim of heads in queries, keys and values."""


def uses_splash(kernel: AttentionKernel, length: int) -> bool:
    """Whether attention of `length` tokens runs the kernel: where it is asked for, and by itself (`auto`) on TPUs where it can."""
    if kernel != "auto":
        return kernel == "splash"
    return on_tpu() and length % KERNEL_BLOCK == 0 and not mesh_axes_of(("length",), (length,), 0)


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
    """What `trainer.model.attention.attend` returns for documents that lie one after another in their row: [B, T, N, V].

    Queries come scaled. axes: logical axes of queries, and of keys and values. A device computes the heads and sequences
    it holds; the mask is made of places in the row and `segments`. Not on a TPU, the kernel is interpreted.
    """
    local = partial(_local_attention, window=window, soft_cap=soft_cap, interpret=not on_tpu())
    query_axes, key_axes = axes
    if mesh_axes_of(key_axes, key_BTKH.shape, HEADS) != mesh_axes_of(query_axes, query_BTNH.shape, HEADS):
        # Fewer key heads than ways the heads are split: each query head takes its key along.
        group = query_BTNH.shape[HEADS] // key_BTKH.shape[HEADS]
        key_BTKH, value_BTKV = (jnp.repeat(array, group, axis=HEADS) for array in (key_BTKH, value_BTKV))
        key_axes = query_axes
    arrays = [query_BTNH, key_BTKH, value_BTKV, segments_BT, sinks_N]
    return map_shards(local, arrays, [query_axes, key_axes, key_axes, query_axes[:HEADS], query_axes[HEADS : HEADS + 1]], like=0)


def _local_attention(
    query_BTNH: jax.Array,
    key_BTKH: jax.Array,
    value_BTKV: jax.Array,
    segments_BT: jax.Array,
    sinks_N: jax.Array | None,
    *,
    window: int | None,
    soft_cap: float | None,
    interpret: bool,
) -> jax.Array:
    _, T, N, _ = query_BTNH.shape
    mask = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
    block = next(size for size in range(LARGEST_BLOCK, 0, -KERNEL_BLOCK) if T % size == 0)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * N),
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=soft_cap,
        interpret=interpret,
    )
    heads_first = [array.swapaxes(1, 2) for array in (query_BTNH, key_BTKH, value_BTKV)]
    run = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))
    mixed_BNTV = cast("jax.Array", run(*heads_first, splash.SegmentIds(segments_BT, segments_BT), sinks_N))
    return mixed_BNTV.swapaxes(1, 2)
