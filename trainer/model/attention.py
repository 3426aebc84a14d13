"""Grouped-query causal attention over packed sequences.

B sequences, T query tokens, S key tokens, N query heads = K key/value heads x G queries each, H head dim, V dims of a
value (H here), D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from trainer.config.context import KEY_AXES, QUERY_AXES
from trainer.config.model import Attention as AttentionSpec
from trainer.config.model import AttentionKernel, Block, ExpertKernel, Rope
from trainer.config.model import LatentAttention as LatentSpec
from trainer.model.attend import Seen, attend, attention_mask
from trainer.model.dropout import Dropout, Site
from trainer.model.kernels import splash_attention, uses_splash
from trainer.model.layers import Params, RmsNorm, add_bias, select, under
from trainer.model.rope import Table, rope_table, rotate
from trainer.model.split_attention import attend_split
from trainer.parallel.context import split_of
from trainer.parallel.sharding import constrain

Cache = Mapping[str, jax.Array]
"""What one attention layer remembers of tokens, by name: [B, S, ...] each (with a leading dim where layers are stacked)."""
ByProducts = dict[str, Any]
"""What a block computes besides its output, by name. `cache`: the Cache of the tokens it was given, where the context asks for it."""


@dataclass(frozen=True)
class Context:
    """What all layers share: computed once per batch, outside of the scan over layers."""

    valid: jax.Array  # bool [B, T]; False in padding
    masks: dict[int | None, jax.Array]  # window -> bool [B, T, S]: query t may see key s
    tables: dict[tuple[Rope, int], Table]  # (rope, rotated dims) -> cosine and sine
    past_masks: Mapping[int | None, jax.Array] = field(default_factory=dict[int | None, jax.Array])
    """window -> bool [B, T, S]: query t may see entry s of a layer's cache."""
    remember: bool = False
    """Whether attention hands out what it would have to remember of these tokens."""
    segments: jax.Array | None = None
    """int32 [B, T], 0 in padding: what the splash kernel makes its mask of."""
    kernel: AttentionKernel = "plain"
    expert_kernel: ExpertKernel = "auto"
    positions: jax.Array | None = None
    """int32 [B, T], each token's place in its document."""
    dropout: Dropout | None = None

    def drop(self, x_BTD: jax.Array, site: Site) -> jax.Array:
        return x_BTD if self.dropout is None else self.dropout(x_BTD, site)

    def later(self, layers: jax.Array | int | None) -> Context:
        """The context so many layers further on."""
        if self.dropout is None or layers is None:
            return self
        return replace(self, dropout=replace(self.dropout, layer=self.dropout.layer + layers))

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        spec: AttentionSpec | LatentSpec,
        sinks_N: jax.Array | None,
        past: Seen | None,
    ) -> jax.Array:
        """`attend` over the documents of the batch, by the kernel that was chosen; with a past always the plain one."""
        if past is None and self.segments is not None and self.positions is not None:
            axes, window, soft_cap = (QUERY_AXES, KEY_AXES), spec.window, spec.soft_cap
            if (split := split_of(QUERY_AXES, query.shape)) is not None:
                rows = self.positions, self.segments
                return attend_split(
                    query, key, value, rows, split,
                    axes=axes, window=window, soft_cap=soft_cap, sinks_N=sinks_N, kernel=self.kernel,
                )  # fmt: skip
            if uses_splash(self.kernel, query.shape[1]):
                return splash_attention(query, key, value, self.segments, axes=axes, window=window, soft_cap=soft_cap, sinks_N=sinks_N)
        return attend(query, key, value, self.masks[spec.window], soft_cap=spec.soft_cap, sinks_N=sinks_N, past=past)


def make_context(
    blocks: list[Block],
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    *,
    past_masks: Mapping[int | None, jax.Array] | None = None,
    remember: bool = False,
    kernel: AttentionKernel = "plain",
    expert_kernel: ExpertKernel = "auto",
) -> Context:
    """The masks and rotary tables `blocks` need.

    positions int32: place of a token in its document; segments int32: document number within the row, 0 = padding.
    past_masks, remember, kernel, expert_kernel: as the fields of Context.
    """
    specs, rows = [block.attention for block in blocks], (positions_BT, segments_BT)
    masks = {window: attention_mask(rows, rows, window) for window in dict.fromkeys(spec.window for spec in specs)}
    keys = dict.fromkeys((spec.rope, spec.rotary_dim) for spec in specs)
    tables = {(rope, rotated): rope_table(positions_BT, rope, rotated) for rope, rotated in keys}
    return Context(segments_BT != 0, masks, tables, past_masks or {}, remember, segments_BT, kernel, expert_kernel, positions_BT)


def named_query_key_value(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The three as they are, under the names that rematerialisation policies use."""
    return checkpoint_name(query, "query"), checkpoint_name(key, "key"), checkpoint_name(value, "value")


class Attention(nnx.Module):
    """Projections, optional query/key norm, rotary embedding, attention, output projection."""

    def __init__(self, spec: AttentionSpec, params: Params) -> None:
        self.spec = spec
        self.query, self.key, self.value, self.out = params["query"], params["key"], params["value"], params["out"]
        self.query_bias, self.key_bias, self.value_bias = (params.get(f"{name}_bias") for name in ("query", "key", "value"))
        self.out_bias = params.get("out_bias")
        norm = spec.qk_norm
        self.query_norm = None if norm is None else RmsNorm(norm, under(params, "query_norm"))
        self.key_norm = None if norm is None else RmsNorm(norm, under(params, "key_norm"))
        self.sinks = params.get("sinks")

    def __call__(self, x_BTD: jax.Array, context: Context, past: Cache | None = None) -> tuple[jax.Array, ByProducts]:
        """past: what this layer remembers of the tokens before these."""
        table = context.tables[self.spec.rope, self.spec.rotary_dim]
        query_BTNH = self.project(x_BTD, self.query, self.query_bias, self.query_norm, table) / self.spec.score_divisor
        key_BTKH = self.project(x_BTD, self.key, self.key_bias, self.key_norm, table)
        value_BTKH = add_bias(jnp.einsum("BTD,DKH->BTKH", x_BTD, self.value[...]), self.value_bias)
        query_BTNH = constrain(query_BTNH.astype(x_BTD.dtype), QUERY_AXES)
        key_BTKH = constrain(select(context.valid, key_BTKH.astype(x_BTD.dtype)), KEY_AXES)
        value_BTKH = constrain(select(context.valid, value_BTKH), KEY_AXES)
        query_BTNH, key_BTKH, value_BTKH = named_query_key_value(query_BTNH, key_BTKH, value_BTKH)
        seen = None if past is None else Seen(past["key"], past["value"], context.past_masks[self.spec.window])
        sinks_N = None if self.sinks is None else self.sinks[...]
        mixed_BTNH = context.attend(query_BTNH, key_BTKH, value_BTKH, self.spec, sinks_N, seen)
        mixed_BTNH = checkpoint_name(constrain(mixed_BTNH, QUERY_AXES), "attention")
        products: ByProducts = {"cache": {"key": key_BTKH, "value": value_BTKH}} if context.remember else {}
        out_BTD = add_bias(jnp.einsum("BTNH,NHD->BTD", mixed_BTNH, self.out[...]), self.out_bias)
        return checkpoint_name(out_BTD, "attention_out"), products

    def project(self, x_BTD: jax.Array, kernel: nnx.Param, bias: nnx.Param | None, norm: RmsNorm | None, table: Table) -> jax.Array:
        """Queries or keys with norm and rotation applied, float32 [B, T, N or K, H]."""
        heads_BTNH = add_bias(jnp.einsum("BTD,DNH->BTNH", x_BTD, kernel[...]), bias)
        return rotate(heads_BTNH if norm is None else norm(heads_BTNH), table, self.spec.rope.pairs)
