"""Attention in blocks of queries and keys, without the scores of more than one pair of blocks at a time, for the ring.

A pair of blocks of which no query sees a key is left out, whatever the reason: order, documents, or a window.

B sequences, N query heads = K key/value heads x G, t tokens of queries, s of keys, H head dim, V dims of a value. Heads come
before tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from trainer.config.context import RING_BLOCK
from trainer.model.attend import MASKED, attention_mask
from trainer.parallel.ring import Found, Gradients, Part, Saved, Visit, merge


def block_visit(chunk: int, window: int | None, soft_cap: float | None) -> Visit:
    """chunk: so many tokens lie in order, from every multiple of it."""
    size = next(size for size in range(min(chunk, RING_BLOCK), 0, -1) if chunk % size == 0)
    pair = _Pair(window, soft_cap, jax.config.jax_default_matmul_precision)
    own = partial(_attend, pair, size)
    gradients = partial(_gradients, pair, size)
    return Visit(
        own,
        lambda query, rows, part, here, origin: own(query, rows, part),
        gradients,
        lambda saved, part, here, origin: gradients(saved, part),
    )


class _Pair:
    """One block of queries and one of keys."""

    def __init__(self, window: int | None, soft_cap: float | None, precision: str | None) -> None:
        self.window, self.soft_cap = window, soft_cap
        self.precision = precision  # of the forward pass: a gradient of one's own is traced outside of what surrounded it

    def mask(self, rows_B2t: jax.Array, rows_B2s: jax.Array) -> jax.Array:
        """Bool [B, t, s]."""
        return attention_mask((rows_B2t[:, 0], rows_B2t[:, 1]), (rows_B2s[:, 0], rows_B2s[:, 1]), self.window)

    def scores(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Float32 [B, K, G, t, s], capped."""
        scores = self.product("BKGtH,BKsH->BKGts", _grouped(query, key.shape[1]), key)
        return scores if self.soft_cap is None else self.soft_cap * jnp.tanh(scores / self.soft_cap)

    def product(self, subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
        with jax.default_matmul_precision(self.precision):
            return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)

    def found(self, query: jax.Array, mask_Bts: jax.Array, part: Part) -> Found:
        scores = jnp.where(mask_Bts[:, None, None], self.scores(query, part.key), MASKED)
        log_z = jax.nn.logsumexp(scores, axis=-1)
        weights = jnp.exp(scores - log_z[..., None]).astype(part.value.dtype)
        mixed = self.product("BKGts,BKsV->BKGtV", weights, part.value)
        return Found(_flat(mixed), _flat(log_z))

    def gradients(self, saved: Saved, delta: jax.Array, mask_Bts: jax.Array, part: Part) -> Gradients:
        """delta: float32 [B, N, t], the product of result and cotangent (Dao et al. 2022, appendix B)."""
        groups, narrow = part.key.shape[1], part.key.dtype
        query, cotangent = (_grouped(array, groups) for array in (saved.query, saved.cotangent.astype(part.value.dtype)))
        log_z, delta = (_grouped(array, groups)[..., None] for array in (saved.log_z, delta))
        scores = self.scores(saved.query, part.key)
        weights = jnp.where(mask_Bts[:, None, None], jnp.exp(scores - log_z), 0)
        value = self.product("BKGts,BKGtV->BKsV", weights.astype(part.value.dtype), cotangent)
        pulled = weights * (self.product("BKGtV,BKsV->BKGts", cotangent, part.value) - delta)
        if self.soft_cap is not None:
            pulled = pulled * (1 - jnp.square(scores / self.soft_cap))
        pulled = pulled.astype(narrow)
        return Gradients(
            _flat(self.product("BKGts,BKsH->BKGtH", pulled, part.key)), self.product("BKGts,BKGtH->BKsH", pulled, query), value
        )


def _attend(pair: _Pair, size: int, query: jax.Array, rows: jax.Array, part: Part) -> Found:
    pieces = Part(*(_blocks(array, size) for array in part))

    def one(block: tuple[jax.Array, jax.Array]) -> Found:
        query, rows = block

        def turn(found: Found, piece: Part) -> tuple[Found, None]:
            mask = pair.mask(rows, piece.rows)
            return _where_any(mask, lambda: merge(found, pair.found(query, mask, piece)), lambda: found), None

        nothing = Found(jnp.zeros((*query.shape[:3], part.value.shape[-1])), jnp.full(query.shape[:3], MASKED))
        return jax.lax.scan(turn, nothing, pieces)[0]

    found = jax.lax.map(one, (_blocks(query, size), _blocks(rows, size)))
    return Found(_joined(found.mixed), _joined(found.log_z))


def _gradients(pair: _Pair, size: int, saved: Saved, part: Part) -> Gradients:
    delta = jnp.sum(saved.mixed.astype(jnp.float32) * saved.cotangent.astype(jnp.float32), axis=-1)
    pieces = Part(*(_blocks(array, size) for array in part))
    zeros = [jnp.zeros(array.shape, jnp.float32) for array in (pieces.key, pieces.value)]

    def one(total: list[jax.Array], block: tuple[Saved, jax.Array]) -> tuple[list[jax.Array], jax.Array]:
        saved, delta = block
        none = Gradients(*(jnp.zeros(array.shape, jnp.float32) for array in (saved.query, pieces.key[0], pieces.value[0])))

        def turn(query: jax.Array, piece: Part) -> tuple[jax.Array, list[jax.Array]]:
            mask = pair.mask(saved.rows, piece.rows)
            found = _where_any(mask, lambda: pair.gradients(saved, delta, mask, piece), lambda: none)
            return query + found.query, [found.key, found.value]

        query, found = jax.lax.scan(turn, none.query, pieces)
        return jax.tree.map(jnp.add, total, found), query

    (key, value), query = jax.lax.scan(one, zeros, (Saved(*(_blocks(array, size) for array in saved)), _blocks(delta, size)))
    return Gradients(_joined(query), _joined(key), _joined(value))


def _where_any[T](mask: jax.Array, then: Callable[[], T], otherwise: Callable[[], T]) -> T:
    return jax.lax.cond(jnp.any(mask), then, otherwise)


def _blocks(x: jax.Array, size: int) -> jax.Array:
    """[B, N, t, ...] -> [t / size, B, N, size, ...]."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], x.shape[2] // size, size, *x.shape[3:]), 2, 0)


def _joined(blocks: jax.Array) -> jax.Array:
    """The inverse of `_blocks`."""
    x = jnp.moveaxis(blocks, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _grouped(x: jax.Array, groups: int) -> jax.Array:
    """[B, N, ...] -> [B, K, G, ...]."""
    return x.reshape(x.shape[0], groups, -1, *x.shape[2:])


def _flat(x: jax.Array) -> jax.Array:
    """[B, K, G, ...] -> [B, N, ...]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])
