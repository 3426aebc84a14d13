"""The splash kernel on the parts that go round a ring.

Of a part that comes from another device a query sees all of a chunk (of its document) or nothing, so there are few forms. With
shard i of n holding chunks i and 2n - 1 - i, the part of an earlier shard j < i shows its first chunk to all queries and its second
one to none; that of a later shard shows both of its chunks to the second half of the queries alone: half of all pairs
each time. Without that order a part is seen whole, or not at all.

B sequences, N heads, t tokens of a device, V dims of a value. Heads come before tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

from trainer.model.attend import MASKED
from trainer.model.kernels import make_kernel
from trainer.parallel.ring import Found, Gradients, Part, Saved, Visit


def splash_visit(tokens: int, heads: int, *, balanced: bool, soft_cap: float | None) -> Visit:
    """tokens and heads: of a device. Without windows."""
    half = tokens // 2

    def kernel(queries: int, keys: int, *, causal: bool = False) -> Any:
        chunk = half if balanced else tokens
        places = np.arange(queries, dtype=np.int32)
        return make_kernel(places, keys, heads, chunk=chunk, soft_cap=soft_cap, causal=causal, residuals=True)

    # Each is made where it runs: its arrays belong to what is being traced, forwards and backwards.
    diagonal, wide = partial(kernel, tokens, tokens, causal=True), partial(kernel, tokens, half if balanced else tokens)
    narrow = partial(kernel, half, tokens) if balanced else None

    def other(query: jax.Array, rows: jax.Array, part: Part, here: jax.Array, origin: jax.Array) -> Found:
        def earlier() -> Found:
            return _attend(wide(), query, rows, _first(part, half) if balanced else part)

        def later() -> Found:
            none = Found(jnp.zeros((*query.shape[:3], part.value.shape[-1])), jnp.full(query.shape[:3], MASKED))
            if narrow is None:
                return none
            seen = _attend(narrow(), query[:, :, half:], rows[:, :, half:], part)
            return Found(*(array.at[:, :, half:].set(found) for array, found in zip(none, seen, strict=True)))

        return jax.lax.cond(origin < here, earlier, later)

    def other_gradients(saved: Saved, part: Part, here: jax.Array, origin: jax.Array) -> Gradients:
        none = Gradients(*(jnp.zeros(array.shape, jnp.float32) for array in (saved.query, part.key, part.value)))

        def earlier() -> Gradients:
            if not balanced:
                return _gradients(wide(), saved, part)
            found = _gradients(wide(), saved, _first(part, half))
            key, value = (array.at[:, :, :half].set(part) for array, part in zip(none[1:], found[1:], strict=True))
            return Gradients(found.query, key, value)

        def later() -> Gradients:
            if narrow is None:
                return none
            found = _gradients(narrow(), Saved(*(array[:, :, half:] for array in saved)), part)
            return Gradients(none.query.at[:, :, half:].set(found.query), found.key, found.value)

        return jax.lax.cond(origin < here, earlier, later)

    return Visit(
        lambda query, rows, part: _attend(diagonal(), query, rows, part),
        other,
        lambda saved, part: _gradients(diagonal(), saved, part),
        other_gradients,
    )


def _first(part: Part, tokens: int) -> Part:
    return Part(*(array[:, :, :tokens] for array in part))


def _attend(kernel: Any, query: jax.Array, rows: jax.Array, part: Part) -> Found:
    segments = splash.SegmentIds(rows[:, 1], part.rows[:, 1])
    mixed, (log_z,) = jax.vmap(kernel)(query, part.key, part.value, segments)
    # Where no key is of the query's document, the kernel's average of all of them has a denominator of almost nothing.
    return Found(mixed.astype(jnp.float32), jnp.maximum(log_z, MASKED))


def _gradients(kernel: Any, saved: Saved, part: Part) -> Gradients:
    """The kernel's own backward pass, with the result and the denominator over all keys."""
    kwargs = kernel.kwargs

    def one(query: jax.Array, part: Part, rows: jax.Array, mixed: jax.Array, log_z: jax.Array, cotangent: jax.Array) -> Gradients:
        segments = splash.SegmentIds(rows[1], part.rows[1])
        residuals = (query, part.key, part.value, segments, None, mixed, log_z, kernel.dq_mask_info, kernel.dkv_mask_info)
        found = splash._splash_attention_bwd(
            False, kwargs["mask_value"], False, kwargs["block_sizes"], None, kwargs["mask_function"], kwargs["attn_logits_soft_cap"],
            kwargs["interpret"], residuals, cotangent,
        )  # fmt: skip
        return Gradients(*(array.astype(jnp.float32) for array in found[3:6]))

    return jax.vmap(one)(saved.query, part, saved.rows, saved.mixed, saved.log_z, saved.cotangent)
