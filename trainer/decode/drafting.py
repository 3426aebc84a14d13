"""Decoding with drafts: a module of multi-token prediction guesses a token, and the next step sees whether it was right.

A step takes the newest token and the draft through the model at once. The first's output is the next token, chosen as ever; where it
is the draft, the second's output is the token after it. So every token is chosen by the model's own logits and the request's own
noise: answers are those of `Engine`, drawn ones too, in fewer steps. (Two tokens are multiplied as other shapes than one, so logits
agree to rounding.) The draft is drawn with the noise of its position, as the token it stands for will be.
B slots, T tokens of a bucket, V vocabulary, D model width.
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
from trainer.parallel.sharding import Layout, constrain, use_layout


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftedPrefix(Prefix):
    module: Caches
    draft: jax.Array  # int32 [1], what may follow `token`


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftedSlots(Slots):
    module: Caches
    """What the module remembers: of a token, with the hidden state before it."""
    draft: jax.Array  # int32 [B], what may follow `token`


class DraftingEngine(Engine):
    """As `Engine`, with the model's first module of multi-token prediction as the draft: one or two tokens of a slot in a step.

    Raises ValueError for a model without such a module.
    """

    further = 1

    def __init__(self, model: Model, params: Mapping[str, jax.Array], layout: Layout, *, slots: int, max_length: int) -> None:
        if not model.depth:
            raise ValueError("the model has no module of multi-token prediction to draft with")
        # The module's one block as a model of its own: what its caches look like.
        last = model.segments[-1].model_copy(update={"repeats": 1, "pattern": (model.blocks[-1],)})
        self._one_block = model.model_copy(update={"segments": (last,), "layers": "unroll"})
        super().__init__(model, params, layout, slots=slots, max_length=max_length)

    def _looked_ahead(self, model: Transformer, prefix: Prefix, tokens_1T: jax.Array, x_1TD: jax.Array, context: Context) -> Prefix:
        places_1T = jnp.arange(tokens_1T.shape[1], dtype=jnp.int32)[None]
        next_1T = jnp.where(places_1T == prefix.count[:, None] - 1, prefix.token[:, None], jnp.roll(tokens_1T, -1, axis=1))
        y_1TD, remembered = look_ahead(model, x_1TD, next_1T, context, None)
        kept = cache.arrange(self._one_block, remembered, prefix.count[0], length=self.max_length, further=self.further)
        last_11D = jax.lax.dynamic_slice_in_dim(y_1TD, prefix.count[0] - 1, 1, axis=1)
        draft = self._drafted(model, last_11D, prefix.rows, prefix.count + 1)
        return DraftedPrefix(**_values(prefix), module=kept, draft=draft)

    def _traced_insert(self, slots: Slots, prefix: Prefix, slot: jax.Array) -> Slots:
        assert isinstance(slots, DraftedSlots) and isinstance(prefix, DraftedPrefix)
        plain = super()._traced_insert(slots, prefix, slot)
        module = cache.insert(self._one_block, slots.module, prefix.module, slot)
        draft = jax.lax.dynamic_update_slice_in_dim(slots.draft, prefix.draft, slot, 0)
        return DraftedSlots(**_values(plain), module=module, draft=draft)

    def _traced_generate(self, params: nnx.State, slots: Slots) -> tuple[Slots, Step]:
        assert isinstance(slots, DraftedSlots)
        with use_layout(self.layout):
            model = self._merged(params)
            busy_B = slots.remaining > 0
            context = self._context(slots.count, busy_B, 2)
            x_B2D, products = model.forward(jnp.stack([slots.token, slots.draft], axis=1), context, slots.caches)
            logits_B2V = constrain(model.logits(x_B2D, context.valid.astype(jnp.int32)), ("batch", None, None))
            first_B = sample(logits_B2V[:, 0], slots.rows, slots.count + 1)
            second_B = sample(logits_B2V[:, 1], slots.rows, slots.count + 2)
            remaining_B = left(first_B, slots.remaining - 1, slots.stop)
            right_B = busy_B & (first_B == slots.draft) & (remaining_B > 0)
            y_B2D, remembered = look_ahead(model, x_B2D, jnp.stack([first_B, second_B], axis=1), context, slots.module)
            count_B = slots.count + busy_B + right_B
            last_B1D = jnp.where(right_B[:, None, None], y_B2D[:, 1:], y_B2D[:, :1])
            remaining_B = jnp.where(right_B, left(second_B, remaining_B - 1, slots.stop), remaining_B)
            # Of a draft that was wrong the entries are written too: the next step's first token takes their place.
            after = replace(
                slots,
                caches=cache.append(self.model, slots.caches, cache.remembered(products), slots.count),
                module=cache.append(self._one_block, slots.module, remembered, slots.count),
                token=jnp.where(busy_B, jnp.where(right_B, second_B, first_B), slots.token),
                draft=self._drafted(model, last_B1D, slots.rows, count_B + 1),
                count=count_B,
                remaining=jnp.where(busy_B, remaining_B, 0),
            )
            made_B2 = jnp.stack([jnp.where(busy_B, first_B, -1), jnp.where(right_B, second_B, -1)], axis=1)
            return after, Step(made_B2, logits_B2V)

    def _drafted(self, model: Transformer, hidden_B1D: jax.Array, rows: Rows, positions_B: jax.Array) -> jax.Array:
        logits_BV = model.logits(hidden_B1D, jnp.ones(hidden_B1D.shape[:2], jnp.int32))[:, 0]
        return sample(constrain(logits_BV, ("batch", None)), rows, positions_B)

    @property
    def _abstract(self) -> Slots:
        plain = super()._abstract

        def remember() -> Caches:
            model = self._merged(self._params)
            count_B = jnp.zeros(self.slots, jnp.int32)
            hidden_B1D = jnp.zeros((self.slots, 1, self.model.width), self.model.compute_dtype)
            return look_ahead(model, hidden_B1D, count_B[:, None], self._context(count_B, count_B > 0, 1), None)[1]

        module = cache.describe(self._one_block, remember, length=self.max_length, layout=self.layout, further=self.further)
        return DraftedSlots(**_values(plain), module=module, draft=plain.token)


def look_ahead(
    model: Transformer, hidden_BTD: jax.Array, next_BT: jax.Array, context: Context, past: Caches | None
) -> tuple[jax.Array, Caches]:
    """The first module's output after its final norm, [B, T, D], for hidden states and the tokens that follow them; what it remembers."""
    module = model.multi_token[0]
    with jax.default_matmul_precision(model.spec.matmul_precision):
        token_BTD = select(context.valid, model.embedding(next_BT, context.valid))
        graphdef, params = model.split(nnx.List([module.block]))
        block, seen = nnx.merge(graphdef, params)[0], None if past is None else past[0][0][0]
        x_BTD, product = block(module.join(select(context.valid, hidden_BTD), token_BTD), context, seen)
        return module.final_norm(select(context.valid, x_BTD)), [[[product["cache"]]]]


def _values(node: Any) -> dict[str, Any]:
    return {field.name: getattr(node, field.name) for field in fields(node)}
