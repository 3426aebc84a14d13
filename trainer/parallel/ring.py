"""Ring attention (Liu et al. 2023): the parts of keys and values go round the devices that share a sequence. It knows no model.

Every device keeps its queries and sees all parts one after the other; results of parts are put together by the logarithm of
their softmax's denominator (Milakov and Gimelshein 2018). The backward pass sends the parts round once more, and with each
the gradient it has collected, which arrives where the part came from. So a device holds two parts and, for the backward
pass, its own inputs and results: O(T / n) of a sequence of T tokens over n devices.

B sequences, N query heads = K key/value heads x G, t tokens of a device, s of a part, H head dim, V dims of a value.
Heads come before tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trainer.parallel.context import Split


class Part(NamedTuple):
    """What travels."""

    key: jax.Array  # [B, K, s, H]
    value: jax.Array  # [B, K, s, V]
    rows: jax.Array  # int32 [B, 2, s]: positions and segments


class Found(NamedTuple):
    """Attention over some keys."""

    mixed: jax.Array  # float32 [B, N, t, V]
    log_z: jax.Array  # float32 [B, N, t], of the softmax's denominator


class Saved(NamedTuple):
    """What the gradient is made of."""

    query: jax.Array  # [B, N, t, H]
    rows: jax.Array  # int32 [B, 2, t]
    mixed: jax.Array  # [B, N, t, V], over all keys
    log_z: jax.Array  # float32 [B, N, t], over all keys and sinks
    cotangent: jax.Array  # [B, N, t, V]


class Gradients(NamedTuple):
    """By what attention over one part takes, float32."""

    query: jax.Array  # [B, N, t, H]
    key: jax.Array  # [B, K, s, H]
    value: jax.Array  # [B, K, s, V]


class Visit(NamedTuple):
    """Attention of a device's queries over one part: its own, or another's (`here` and `origin`: the two places in the ring)."""

    own: Callable[[jax.Array, jax.Array, Part], Found]
    other: Callable[[jax.Array, jax.Array, Part, jax.Array, jax.Array], Found]
    """(queries, their rows, part, here, origin)."""
    own_gradients: Callable[[Saved, Part], Gradients]
    other_gradients: Callable[[Saved, Part, jax.Array, jax.Array], Gradients]


def merge(one: Found, other: Found) -> Found:
    """Attention over the keys of both."""
    log_z = jnp.logaddexp(one.log_z, other.log_z)
    mixed = sum(jnp.exp(part.log_z - log_z)[..., None] * part.mixed for part in (one, other))
    assert isinstance(mixed, jax.Array)
    return Found(mixed, log_z)


def ring_attention(query: jax.Array, part: Part, sinks_N: jax.Array | None, *, split: Split, visit: Visit) -> jax.Array:
    """Within `shard_map`: attention of a device's queries [B, N, t, H] over all parts of the sequence, [B, N, t, V] in the dtype of
    the values. part: the device's own, whose rows are the queries' too. sinks: one more logit of each head, without a value.
    """

    @jax.custom_vjp
    def run(query: jax.Array, part: Part, sinks_N: jax.Array | None) -> jax.Array:
        return forward(query, part, sinks_N)[0]

    def forward(query: jax.Array, part: Part, sinks_N: jax.Array | None) -> tuple[jax.Array, Any]:
        here, found = jax.lax.axis_index(split.axes), visit.own(query, part.rows, part)

        def turn(carry: tuple[Found, Part], hop: jax.Array) -> tuple[tuple[Found, Part], None]:
            found, visitor = carry
            onward = _send(visitor, split)  # while this device computes with it
            return (merge(found, visit.other(query, part.rows, visitor, here, (here - hop) % split.ways)), onward), None

        (found, _), _ = jax.lax.scan(turn, (found, _send(part, split)), jnp.arange(1, split.ways))
        mixed, log_z = found
        if sinks_N is not None:
            log_z = jnp.logaddexp(found.log_z, sinks_N[None, :, None].astype(jnp.float32))
            mixed = jnp.exp(found.log_z - log_z)[..., None] * mixed
        mixed = mixed.astype(part.value.dtype)
        return mixed, (query, part, sinks_N, mixed, log_z)

    def backward(residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, Part, jax.Array | None]:
        query, part, sinks_N, mixed, log_z = residuals
        saved, here = Saved(query, part.rows, mixed, log_z, cotangent), jax.lax.axis_index(split.axes)
        own = visit.own_gradients(saved, part)

        def turn(carry: tuple[Gradients, Part], hop: jax.Array) -> tuple[tuple[Gradients, Part], None]:
            total, visitor = carry
            onward, collected = _send((visitor, (total.key, total.value)), split)
            found = visit.other_gradients(saved, visitor, here, (here - hop) % split.ways)
            # What the device before this one sent belongs to the part that is here now.
            key, value = (a + b for a, b in zip(collected, (found.key, found.value), strict=True))
            return (Gradients(total.query + found.query, key, value), onward), None

        (total, _), _ = jax.lax.scan(turn, (own, _send(part, split)), jnp.arange(1, split.ways))
        key, value = _send((total.key, total.value), split)  # home
        dsinks = None
        if sinks_N is not None:
            delta = jnp.sum(mixed.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
            dsinks = -jnp.sum(jnp.exp(sinks_N[None, :, None].astype(jnp.float32) - log_z) * delta, axis=(0, 2)).astype(sinks_N.dtype)
        gradient = Part(key.astype(part.key.dtype), value.astype(part.value.dtype), None)  # pyright: ignore[reportArgumentType]
        return total.query.astype(query.dtype), gradient, dsinks

    run.defvjp(forward, backward)
    return run(query, part, sinks_N)


def _send(tree: Any, split: Split) -> Any:
    """The same of the device before this one; to the next one goes its own."""
    onward = [(place, (place + 1) % split.ways) for place in range(split.ways)]
    return jax.tree.map(lambda array: jax.lax.ppermute(array, split.axes, onward), tree)
