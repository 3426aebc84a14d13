"""Multi-head latent attention (DeepSeek-V2, 2024).

B sequences, T query tokens, S key tokens, N heads, H dims of a query (P plain, then R rotated), V dims of a value, C the latent
of keys and values, D model width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from trainer.config.context import QUERY_AXES
from trainer.config.model import LatentAttention as LatentSpec
from trainer.model.attend import Seen
from trainer.model.attention import ByProducts, Cache, Context, named_query_key_value
from trainer.model.layers import Params, RmsNorm, add_bias, select, under
from trainer.model.rope import rotate
from trainer.parallel.sharding import constrain


class LatentAttention(nnx.Module):
    """Queries and, from one narrow latent of each token, the keys and values of all heads; positions in a key of their own."""

    def __init__(self, spec: LatentSpec, params: Params) -> None:
        self.spec = spec
        self.query, self.query_down, self.query_up = params.get("query"), params.get("query_down"), params.get("query_up")
        self.query_down_bias = params.get("query_down_bias")
        self.query_norm = None if spec.query_rank is None else RmsNorm(spec.latent_norm, under(params, "query_norm"))
        self.key_value_down, self.key_value_up = params["key_value_down"], params["key_value_up"]
        self.key_value_down_bias = params.get("key_value_down_bias")
        self.key_value_norm = RmsNorm(spec.latent_norm, under(params, "key_value_norm"))
        self.out, self.out_bias = params["out"], params.get("out_bias")

    def __call__(self, x_BTD: jax.Array, context: Context, past: Cache | None = None) -> tuple[jax.Array, ByProducts]:
        """past: what this layer remembers of the tokens before these, as `latent` returns it."""
        query_BTNH = constrain(self.queries(x_BTD, context), QUERY_AXES)
        present = self.latent(x_BTD, context)
        seen = None if past is None else Seen(*self.keys_and_values(past), context.past_masks[self.spec.window])
        query_BTNH, key_BSNH, value_BSNV = named_query_key_value(query_BTNH, *self.keys_and_values(present))
        mixed_BTNV = context.attend(query_BTNH, key_BSNH, value_BSNV, self.spec, None, seen)
        mixed_BTNV = checkpoint_name(constrain(mixed_BTNV, QUERY_AXES), "attention")
        products: ByProducts = {"cache": present} if context.remember else {}
        out_BTD = add_bias(jnp.einsum("BTNV,NVD->BTD", mixed_BTNV, self.out[...]), self.out_bias)
        return checkpoint_name(out_BTD, "attention_out"), products

    def queries(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        """Scaled queries in the dtype of `x`, [B, T, N, H]."""
        latent, kernel = x_BTD, self.query
        if self.query_down is not None and self.query_norm is not None:
            latent = add_bias(jnp.einsum("BTD,DC->BTC", x_BTD, self.query_down[...]), self.query_down_bias)
            latent, kernel = self.query_norm(latent), self.query_up
        assert kernel is not None
        query_BTNH = jnp.einsum("BTC,CNH->BTNH", latent, kernel[...])
        plain_BTNP, rotary_BTNR = jnp.split(query_BTNH, [self.spec.plain_dim], axis=-1)
        rotated_BTNR = self.rotate(rotary_BTNR, context)
        return (jnp.concatenate([plain_BTNP.astype(jnp.float32), rotated_BTNR], axis=-1) / self.spec.score_divisor).astype(x_BTD.dtype)

    def latent(self, x_BTD: jax.Array, context: Context) -> dict[str, jax.Array]:
        """What is remembered of a token: its normed latent [B, S, C] and its rotated key [B, S, R], zeros in padding."""
        both = add_bias(jnp.einsum("BTD,DC->BTC", x_BTD, self.key_value_down[...]), self.key_value_down_bias)
        latent_BSC, rotary_BSR = jnp.split(both, [self.spec.key_value_rank], axis=-1)
        rotated_BSR = self.rotate(rotary_BSR[:, :, None, :], context)[:, :, 0, :].astype(x_BTD.dtype)
        return {"latent": select(context.valid, self.key_value_norm(latent_BSC)), "rotated": select(context.valid, rotated_BSR)}

    def keys_and_values(self, cache: Cache) -> tuple[jax.Array, jax.Array]:
        """Keys [B, S, N, H] and values [B, S, N, V] of all heads, of what `latent` returns."""
        both = jnp.einsum("BSC,CNP->BSNP", cache["latent"], self.key_value_up[...])
        plain_BSNP, value_BSNV = jnp.split(both, [self.spec.plain_dim], axis=-1)
        rotated_BSR = cache["rotated"]
        rotated_BSNR = jnp.broadcast_to(rotated_BSR[:, :, None, :], (*plain_BSNP.shape[:3], rotated_BSR.shape[-1]))
        key_BSNH = jnp.concatenate([plain_BSNP, rotated_BSNR], axis=-1)
        return constrain(key_BSNH, QUERY_AXES), constrain(value_BSNV, QUERY_AXES)

    def rotate(self, x_BTNR: jax.Array, context: Context) -> jax.Array:
        return rotate(x_BTNR, context.tables[self.spec.rope, self.spec.rotary_dim], self.spec.rope.pairs)
