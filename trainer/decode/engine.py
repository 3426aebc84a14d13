"""The decode engine: three compiled programs over a fixed number of slots.

`prefill` runs a prompt alone, `insert` puts what it left into a slot, `generate` makes one token for every slot. A
request never sees another: a prompt is computed by itself, padded to a bucket its own length decides, and each
slot reads its own cache. B slots, T tokens of a bucket, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trainer.config.model import Model
from trainer.decode import cache
from trainer.decode.cache import Caches
from trainer.decode.sampling import Rows, Sampling, one_row, sample
from trainer.model import Transformer, create_abstract_model
from trainer.model.attention import Context, make_context
from trainer.parallel.sharding import Layout, constrain, use_layout

SMALLEST_BUCKET: Final = 16
MAX_STOP_TOKENS: Final = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """A prompt and its first new token, ready to go into a slot."""

    caches: Caches  # of one slot
    token: jax.Array  # int32 [1], the first new token
    logits: jax.Array  # float32 [1, V], of that token
    count: jax.Array  # int32 [1], tokens of the prompt
    remaining: jax.Array  # int32 [1], further tokens to generate
    rows: Rows
    stop: jax.Array  # int32 [1, MAX_STOP_TOKENS], filled up with -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """Everything `generate` reads and writes. A slot with `remaining` 0 is free."""

    caches: Caches
    token: jax.Array  # int32 [B], the newest token, not yet in the caches
    count: jax.Array  # int32 [B], tokens in the caches
    remaining: jax.Array  # int32 [B], tokens still to be generated
    rows: Rows
    stop: jax.Array  # int32 [B, MAX_STOP_TOKENS]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Step:
    """What one call of `generate` made."""

    token: jax.Array  # int32 [B], with K drafts [B, 1 + K]; -1 for a slot that was free, and from the first wrong draft on
    logits: jax.Array  # float32 [B, V], with drafts [B, 1 + K, V], the tokens were chosen from; of a free slot meaningless


class Engine:
    """Prefill, insert and generate for `model` with `params` (arrays by path, laid out as `layout` says) over `slots` slots.

    max_length: tokens of a sequence, prompt and answer together. Mixtures of experts never drop a token here.
    Compiled once: `insert` and `generate`; `prefill` once for each bucket (a power of two, at least 16) that is used.
    """

    further = 0
    """Tokens a step keeps that may turn out not to be in the sequence."""
    beyond = 0
    """Positions behind the last of a sequence that a step may compute."""

    def __init__(self, model: Model, params: Mapping[str, jax.Array], layout: Layout, *, slots: int, max_length: int) -> None:
        if slots < 1 or max_length < 2:
            raise ValueError(f"slots ({slots}) must be at least 1 and max_length ({max_length}) at least 2")
        self.model, self.layout, self.slots, self.max_length = model, layout, slots, max_length
        self._graphdef, abstract = nnx.split(create_abstract_model(model))
        flat = [(path, leaf.replace(params["/".join(map(str, path))])) for path, leaf in nnx.to_flat_state(abstract)]
        self._params = nnx.from_flat_state(flat)
        self._windows = [block.attention.window for segment in model.segments for block in segment.pattern]
        shardings = self._shardings()
        self._prefill = jax.jit(self._traced_prefill)
        self._insert = jax.jit(self._traced_insert, donate_argnums=0, out_shardings=shardings)
        self._generate = jax.jit(self._traced_generate, donate_argnums=1, out_shardings=(shardings, layout.replicated))

    def empty(self) -> Slots:
        """All slots free."""

        def zeros() -> Slots:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._abstract)

        return jax.jit(zeros, out_shardings=self._shardings())()

    def prefill(self, prompt: Sequence[int], *, max_tokens: int, sampling: Sampling, stop: Sequence[int] = ()) -> Prefix:
        """Run a prompt and choose the first of `max_tokens` new tokens; a token of `stop` ends the request early.

        Raises ValueError for a request this engine cannot hold.
        """
        self.require_fits(prompt, max_tokens, stop)
        tokens = np.zeros((1, self.bucket(len(prompt))), np.int32)
        tokens[0, : len(prompt)] = prompt
        stops = np.full((1, MAX_STOP_TOKENS), -1, np.int32)
        stops[0, : len(stop)] = stop
        count, remaining = np.array([len(prompt)], np.int32), np.array([max_tokens - 1], np.int32)
        return self._prefill(self._params, tokens, count, remaining, one_row(sampling), stops)

    def insert(self, slots: Slots, prefix: Prefix, slot: int) -> Slots:
        """The slots (donated) with `prefix` in place of whatever was in `slot`."""
        return self._insert(slots, prefix, np.int32(slot))

    def generate(self, slots: Slots) -> tuple[Slots, Step]:
        """One more token for every slot that is not free. The slots are donated."""
        return self._generate(self._params, slots)

    def bucket(self, length: int) -> int:
        """Tokens a prompt of `length` is padded to."""
        return min(max(1 << (length - 1).bit_length(), SMALLEST_BUCKET), self.max_length)

    def require_fits(self, prompt: Sequence[int], max_tokens: int, stop: Sequence[int] = ()) -> None:
        """Raises ValueError, with the arithmetic, where a request does not fit."""
        if not prompt:
            raise ValueError("the prompt has no token")
        if strange := [token for token in (*prompt, *stop) if not 0 <= token < self.model.vocab_size]:
            raise ValueError(f"token {strange[0]} is not in the vocabulary of {self.model.vocab_size}")
        if max_tokens < 1 or len(prompt) + max_tokens > self.max_length:
            raise ValueError(f"{len(prompt)} prompt tokens and {max_tokens} new ones; at least 1 new, and {self.max_length} together, fit")
        if len(stop) > MAX_STOP_TOKENS:
            raise ValueError(f"{len(stop)} stop tokens, at most {MAX_STOP_TOKENS}")

    def _merged(self, params: nnx.State) -> Transformer:
        return nnx.merge(self._graphdef, params)

    def _traced_prefill(
        self, params: nnx.State, tokens_1T: jax.Array, count: jax.Array, remaining: jax.Array, rows: Rows, stop: jax.Array
    ) -> Prefix:
        with use_layout(self.layout):
            model = self._merged(params)
            positions_1T = jnp.arange(tokens_1T.shape[1], dtype=jnp.int32)[None]
            segments_1T = (positions_1T < count[:, None]).astype(jnp.int32)
            context = make_context(self._blocks(), positions_1T, segments_1T, remember=True, expert_kernel=self.model.expert_kernel)
            x_1TD, products = model.forward(tokens_1T, context)
            last_11D = jax.lax.dynamic_slice_in_dim(x_1TD, count[0] - 1, 1, axis=1)
            logits_1V = constrain(model.logits(last_11D, jnp.ones((1, 1), jnp.int32))[:, 0], (None, None))
            token = sample(logits_1V, rows, count)
            caches = cache.arrange(self.model, cache.remembered(products), count[0], length=self._length, further=self.further)
            prefix = Prefix(caches, token, logits_1V, count, left(token, remaining, stop), rows, stop)
            return self._looked_ahead(model, prefix, tokens_1T, x_1TD, context)

    def _looked_ahead(self, model: Transformer, prefix: Prefix, tokens_1T: jax.Array, x_1TD: jax.Array, context: Context) -> Prefix:
        """What `prefill` returns, of the hidden states of the prompt and the context they were computed in."""
        return prefix

    def _traced_insert(self, slots: Slots, prefix: Prefix, slot: jax.Array) -> Slots:
        caches = cache.insert(self.model, slots.caches, prefix.caches, slot)
        put = {name: getattr(prefix, name) for name in ("token", "count", "remaining", "rows", "stop")}
        kept = {name: getattr(slots, name) for name in put}
        rest = jax.tree.map(lambda all_B, one: jax.lax.dynamic_update_slice_in_dim(all_B, one, slot, 0), kept, put)
        return Slots(caches, **rest)

    def _traced_generate(self, params: nnx.State, slots: Slots) -> tuple[Slots, Step]:
        with use_layout(self.layout):
            model = self._merged(params)
            busy_B = slots.remaining > 0
            x_B1D, products = model.forward(slots.token[:, None], self._context(slots.count, busy_B, 1), slots.caches)
            logits_BV = constrain(model.logits(x_B1D, jnp.ones_like(busy_B, jnp.int32)[:, None])[:, 0], ("batch", None))
            token_B = sample(logits_BV, slots.rows, slots.count + 1)
            after = replace(
                slots,
                caches=cache.append(self.model, slots.caches, cache.remembered(products), slots.count),
                token=jnp.where(busy_B, token_B, slots.token),
                count=slots.count + busy_B,
                remaining=jnp.where(busy_B, left(token_B, slots.remaining - 1, slots.stop), 0),
            )
            return after, Step(jnp.where(busy_B, token_B, -1), logits_BV)

    def _context(self, count_B: jax.Array, busy_B: jax.Array, tokens: int) -> Context:
        """Of so many new tokens in every slot, behind those it has."""
        positions_BT = count_B[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]
        segments_BT = (busy_B[:, None] & (positions_BT >= 0)).astype(jnp.int32)
        masks = cache.past_masks(self._windows, positions_BT, count_B, length=self._length, further=self.further)
        return make_context(
            self._blocks(), positions_BT, segments_BT,
            past_masks=masks, remember=True, expert_kernel=self.model.expert_kernel,
        )  # fmt: skip

    @property
    def _length(self) -> int:
        """Positions of a slot."""
        return self.max_length + self.beyond

    def _blocks(self) -> list[Any]:
        return [block for segment in self.model.segments for block in segment.pattern]

    @property
    def _abstract(self) -> Slots:
        """The slots without values, laid out over the mesh."""
        B = self.slots

        def small(dtype: Any, *dims: int) -> Any:
            return jax.ShapeDtypeStruct((B, *dims), dtype, sharding=self.layout.replicated)

        def remember(params: nnx.State) -> Caches:
            zeros_B = jnp.zeros(B, jnp.int32)
            return cache.remembered(self._merged(params).forward(zeros_B[:, None], self._context(zeros_B, zeros_B > 0, 1))[1])

        length, further = self._length, self.further
        caches = cache.describe(self.model, lambda: remember(self._params), length=length, layout=self.layout, further=further)
        f, i = jnp.float32, jnp.int32
        rows = Rows(small(f), small(i), small(f), small(f), small(jnp.uint32, 2))
        return Slots(caches, small(i), small(i), small(i), rows, small(i, MAX_STOP_TOKENS))

    def _shardings(self) -> Slots:
        return jax.tree.map(lambda leaf: leaf.sharding, self._abstract)


def left(token_B: jax.Array, remaining_B: jax.Array, stop: jax.Array) -> jax.Array:
    """Tokens still to be generated after `token`: none when it is a stop token."""
    return jnp.where(jnp.any(token_B[:, None] == stop, axis=-1), 0, remaining_B)
