"""Plain attention: a mask made of positions and documents, matrix products and a softmax.

B sequences, T query tokens, S key tokens, N query heads = K key/value heads x G queries each, H head dim, V dims of a value.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import jax
import jax.numpy as jnp

from trainer.model.layers import einsum_float32

# Finite, so that a row can never be all -inf; far below any score in float32.
MASKED: Final = -1e30

Rows = tuple[jax.Array, jax.Array]
"""Positions and segments of tokens, int32 [B, T]: the place in a document, and its number in the row, 0 in padding."""


class Seen(NamedTuple):
    """Keys, values and which query sees which of them."""

    key: jax.Array  # [B, S, K, H]
    value: jax.Array  # [B, S, K, H]
    mask: jax.Array  # bool [B, T, S]


def attention_mask(queries: Rows, keys: Rows, window: int | None) -> jax.Array:
    """Bool [B, T, S]: same document, not later, and within `window` positions where given.

    Made of positions, not of places in the row, so it holds for any order of the tokens. A token always sees
    itself; padding sees only padding.
    """
    (positions_BT, segments_BT), (positions_BS, segments_BS) = queries, keys
    distance_BTS = positions_BT[:, :, None] - positions_BS[:, None, :]
    mask_BTS = (segments_BT[:, :, None] == segments_BS[:, None, :]) & (distance_BTS >= 0)
    return mask_BTS if window is None else mask_BTS & (distance_BTS < window)


def attend(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKV: jax.Array,
    mask_BTS: jax.Array,
    *,
    soft_cap: float | None,
    sinks_N: jax.Array | None = None,
    past: Seen | None = None,
) -> jax.Array:
    """softmax(cap(q k^T)) v with the softmax in float32; queries come scaled. Returns [B, T, N, V] in the dtype of `value`.

    sinks: one more logit of each head in its softmax, without a value (Xiao et al. 2023, GPT-OSS).
    past: further keys and values, of earlier tokens; the softmax is over both.
    """
    B, T, N, H = query_BTNH.shape
    K, V = key_BSKH.shape[2], value_BSKV.shape[3]
    # "..." is G, or nothing where every query head has its own key: XLA on CPU transposes scores for a dim of size 1.
    # Keys come first, and weights before values, for the same reason.
    group = () if N == K else (N // K,)
    query = query_BTNH.reshape(B, T, K, *group, H)
    present = Seen(key_BSKH, value_BSKV, mask_BTS)
    parts = [present] if past is None else [past, present]
    scored: list[jax.Array] = []
    for part in parts:
        scores = einsum_float32("BSKH,BTK...H->BK...TS", part.key, query)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scored.append(jnp.where(jnp.expand_dims(part.mask, range(1, scores.ndim - 2)), scores, MASKED))
    scores = scored[0] if past is None else jnp.concatenate(scored, axis=-1)
    weights = softmax_with_sinks(scores, sinks_N).astype(value_BSKV.dtype)
    mixed = [
        jnp.einsum("BK...TS,BSKV->BTK...V", share, part.value)
        for share, part in zip([weights] if past is None else jnp.split(weights, [past.mask.shape[-1]], axis=-1), parts, strict=True)
    ]
    return (mixed[0] if past is None else mixed[0] + mixed[1]).reshape(B, T, N, V)


def softmax_with_sinks(scores: jax.Array, sinks_N: jax.Array | None) -> jax.Array:
    """Softmax of float32 scores [B, K, ..., T, S] over S and, where given, a sink of each of the N = K x ... heads."""
    if sinks_N is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = sinks_N.reshape(1, *scores.shape[1:-2], 1, 1)
    return jnp.exp(scores - jnp.logaddexp(jax.nn.logsumexp(scores, axis=-1, keepdims=True), sinks))
