"""Decoding with drafts: modules of multi-token prediction guess tokens, and the next step sees which of them were right.

A step takes the newest token and the K drafts through the model at once. The first's output is the next token, chosen as ever; where
it is the first draft, that one's output is the token after it, and so on. So every token is chosen by the model's own logits and the
request's own noise: answers are those of `Engine`, drawn ones too, in fewer steps. (Several tokens are multiplied as other shapes than
one, so logits agree to rounding.) A draft is drawn with the noise of its position, as the token it stands for will be.

Module m joins what module m - 1 says at a position (the first: the model) with the token m places on, and draws the token behind that
one. With the newest token at position n, all speak at position n - 1: the first reads the newest token and draws n + 1, the second reads
this draft and draws n + 2. What module m remembers of its last m - 1 places was made of drafts, so a step runs the modules over K - 1
places that it ran over before: these hidden states and tokens are kept in the slot.

B slots, T tokens of a bucket, K modules, W = 2 K places modules run over, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from trainer.config.model import Model
from trainer.decode import cache
from trainer.decode.cache import Caches
from trainer.decode.engine import Engine, Prefix, Slots, Step, left
from trainer.decode.sampling import Rows, sample
from trainer.model import Transformer
from trainer.model.attention import Context
from trainer.model.layers import select
from trainer.model.multi_token import Module
from trainer.parallel.sharding import Layout, constrain, use_layout


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drafted:
    """What a slot has for and of its modules. Its newest token is at position n."""

    modules: list[Caches]
    """What each remembers: of a position, with what was said before it there and the token so many places on."""
    drafts: jax.Array  # int32 [B, K], what may follow the newest token
    hidden: jax.Array  # [B, K - 1, D], the model's hidden states of positions n - K + 1 ... n - 1
    tokens: jax.Array  # int32 [B, K - 1], their tokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftedPrefix(Prefix):
    drafted: Drafted


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftedSlots(Slots):
    drafted: Drafted


class DraftingEngine(Engine):
    """As `Engine`, with the model's modules of multi-token prediction as drafts: one to 1 + K tokens of a slot in a step.

    Raises ValueError for a model without such a module.
    """

    def __init__(self, model: Model, params: Mapping[str, jax.Array], layout: Layout, *, slots: int, max_length: int) -> None:
        if not model.depth:
            raise ValueError("the model has no module of multi-token prediction to draft with")
        # The last sure position of one step is the first unsure one of another at most W - 1 further on.
        self.further, self.beyond = 2 * model.depth - 1, model.depth - 1
        # A module's one block as a model of its own: what its caches look like.
        last = model.segments[-1].model_copy(update={"repeats": 1, "pattern": (model.blocks[-1],)})
        self._one_block = model.model_copy(update={"segments": (last,), "layers": "unroll"})
        super().__init__(model, params, layout, slots=slots, max_length=max_length)

    def _looked_ahead(self, model: Transformer, prefix: Prefix, tokens_1T: jax.Array, x_1TD: jax.Array, context: Context) -> Prefix:
        K, T = self.model.depth, tokens_1T.shape[1]
        count = prefix.count[0]
        places = jnp.arange(T + K)[None]
        known = jnp.where(places == count, prefix.token[:, None], jnp.pad(tokens_1T, ((0, 0), (0, K))))
        y_1TD, modules, drafts = x_1TD, list[Caches](), list[jax.Array]()
        for m, module in enumerate(model.multi_token, 1):
            y_1TD, remembered = look_ahead(model, module, y_1TD, known[:, m : m + T], context, None)
            modules.append(cache.arrange(self._one_block, remembered, count, length=self._length, further=self.further))
            last_11D = jax.lax.dynamic_slice_in_dim(y_1TD, count - 1, 1, axis=1)
            drafts.append(self._drawn(model, last_11D, prefix.rows, prefix.count + m))
            known = jnp.where(places == count + m, drafts[-1][:, None], known)
        # Of a prompt shorter than K - 1 tokens the first ones are before its beginning.
        hidden, tokens = (
            jax.lax.dynamic_slice_in_dim(jnp.pad(all_1T, ((0, 0), (K - 1, 0), *[(0, 0)] * (all_1T.ndim - 2))), count, K - 1, axis=1)
            for all_1T in (x_1TD, tokens_1T)
        )
        return DraftedPrefix(**_values(prefix), drafted=Drafted(modules, jnp.stack(drafts, axis=1), hidden, tokens))

    def _traced_insert(self, slots: Slots, prefix: Prefix, slot: jax.Array) -> Slots:
        assert isinstance(slots, DraftedSlots) and isinstance(prefix, DraftedPrefix)
        plain = super()._traced_insert(slots, prefix, slot)
        put, kept = prefix.drafted, slots.drafted
        pairs = zip(kept.modules, put.modules, strict=True)
        modules = [cache.insert(self._one_block, module, row, slot) for module, row in pairs]
        rest = {
            name: jax.lax.dynamic_update_slice_in_dim(getattr(kept, name), getattr(put, name), slot, 0)
            for name in ("drafts", "hidden", "tokens")
        }
        return DraftedSlots(**_values(plain), drafted=Drafted(modules, **rest))

    def _traced_generate(self, params: nnx.State, slots: Slots) -> tuple[Slots, Step]:
        assert isinstance(slots, DraftedSlots)
        K, before = self.model.depth, slots.drafted
        with use_layout(self.layout):
            model = self._merged(params)
            busy_B = slots.remaining > 0
            context = self._context(slots.count, busy_B, 1 + K)
            x_BTD, products = model.forward(jnp.concatenate([slots.token[:, None], before.drafts], axis=1), context, slots.caches)
            logits_BTV = constrain(model.logits(x_BTD, context.valid.astype(jnp.int32)), ("batch", None, None))
            chosen = [sample(logits_BTV[:, j], slots.rows, slots.count + 1 + j) for j in range(1 + K)]
            token_B, remaining_B, made, taken_B = slots.token, slots.remaining, list[jax.Array](), busy_B
            for j, chosen_B in enumerate(chosen):
                remaining_B = jnp.where(taken_B, left(chosen_B, remaining_B - 1, slots.stop), remaining_B)
                token_B = jnp.where(taken_B, chosen_B, token_B)
                made.append(jnp.where(taken_B, chosen_B, -1))
                if j < K:
                    taken_B &= (chosen_B == before.drafts[:, j]) & (remaining_B > 0)
            made_BT = jnp.stack(made, axis=1)
            taken_B = jnp.sum(made_BT >= 0, axis=1)
            # Entries of drafts that were wrong are written too: the next step's take their places.
            after = replace(
                slots,
                caches=cache.append(self.model, slots.caches, cache.remembered(products), slots.count),
                token=token_B,
                count=slots.count + taken_B,
                remaining=remaining_B,
                drafted=self._draft(model, slots, x_BTD, jnp.stack(chosen, axis=1), taken_B),
            )
            return after, Step(made_BT, logits_BTV)

    def _draft(self, model: Transformer, slots: DraftedSlots, x_BTD: jax.Array, chosen_BT: jax.Array, taken_B: jax.Array) -> Drafted:
        """The drafts behind a step's tokens, of which `taken` are in the sequence. x: the step's hidden states [B, 1 + K, D]."""
        K, before = self.model.depth, slots.drafted
        first_B = slots.count - (K - 1)
        context = self._context(first_B, slots.remaining > 0, 2 * K)
        hidden_BWD = jnp.concatenate([before.hidden, x_BTD], axis=1)
        # Tokens from position `first` on: kept, newest, chosen; drafts take the places behind those that are taken.
        known = jnp.pad(jnp.concatenate([before.tokens, slots.token[:, None], chosen_BT], axis=1), ((0, 0), (0, K - 1)))
        places = jnp.arange(known.shape[1])[None]
        y_BWD, modules, drafts = hidden_BWD, list[Caches](), list[jax.Array]()
        for m, module in enumerate(model.multi_token, 1):
            y_BWD, remembered = look_ahead(model, module, y_BWD, known[:, m : m + 2 * K], context, before.modules[m - 1])
            modules.append(cache.append(self._one_block, before.modules[m - 1], remembered, first_B))
            last_B1D = jnp.take_along_axis(y_BWD, (jnp.maximum(taken_B, 1) + K - 2)[:, None, None], axis=1)
            drafts.append(self._drawn(model, last_B1D, slots.rows, slots.count + taken_B + m))
            known = jnp.where(places == (taken_B + K - 1 + m)[:, None], drafts[-1][:, None], known)
        kept_BK = taken_B[:, None] + jnp.arange(K - 1)[None]
        hidden = jnp.take_along_axis(hidden_BWD, kept_BK[:, :, None], axis=1)
        return Drafted(modules, jnp.stack(drafts, axis=1), hidden, jnp.take_along_axis(known, kept_BK, axis=1))

    def _drawn(self, model: Transformer, hidden_B1D: jax.Array, rows: Rows, positions_B: jax.Array) -> jax.Array:
        logits_BV = model.logits(hidden_B1D, jnp.ones(hidden_B1D.shape[:2], jnp.int32))[:, 0]
        return sample(constrain(logits_BV, ("batch", None)), rows, positions_B)

    @property
    def _abstract(self) -> Slots:
        plain = super()._abstract
        B, K, D, dtype = self.slots, self.model.depth, self.model.width, jnp.dtype(self.model.compute_dtype)

        def remember() -> Caches:
            model = self._merged(self._params)
            count_B = jnp.zeros(B, jnp.int32)
            context = self._context(count_B, count_B > 0, 1)
            return look_ahead(model, model.multi_token[0], jnp.zeros((B, 1, D), dtype), count_B[:, None], context, None)[1]

        def small(dtype: Any, *dims: int) -> Any:
            return jax.ShapeDtypeStruct((B, *dims), dtype, sharding=self.layout.replicated)

        module = cache.describe(self._one_block, remember, length=self._length, layout=self.layout, further=self.further)
        drafted = Drafted([module] * K, small(jnp.int32, K), small(dtype, K - 1, D), small(jnp.int32, K - 1))
        return DraftedSlots(**_values(plain), drafted=drafted)


def look_ahead(
    model: Transformer, module: Module, hidden_BTD: jax.Array, token_BT: jax.Array, context: Context, past: Caches | None
) -> tuple[jax.Array, Caches]:
    """A module's output after its final norm, [B, T, D], for what was said before it and the tokens it reads; what it remembers."""
    with jax.default_matmul_precision(model.spec.matmul_precision):
        token_BTD = select(context.valid, model.embedding(token_BT, context.valid))
        graphdef, params = model.split(nnx.List([module.block]))
        block, seen = nnx.merge(graphdef, params)[0], None if past is None else past[0][0][0]
        x_BTD, product = block(module.join(select(context.valid, hidden_BTD), token_BTD), context, seen)
        return module.final_norm(select(context.valid, x_BTD)), [[[product["cache"]]]]


def _values(node: Any) -> dict[str, Any]:
    return {field.name: getattr(node, field.name) for field in fields(node)}
