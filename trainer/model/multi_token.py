"""Multi-token prediction (DeepSeek-V3, 2024, section 2.2): what a module joins, and what lies k tokens ahead in a document.

B sequences, T tokens, D model width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from trainer.config.model import Model
from trainer.model.layers import Params, RmsNorm, under
from trainer.parallel.context import as_stored, in_order


class Module(nnx.Module):
    """Norms and projections around one block; the block, embedding and head are run by the model."""

    def __init__(self, spec: Model, params: Params, block: nnx.Module) -> None:
        self.hidden_norm, self.token_norm, self.final_norm = (
            RmsNorm(spec.final_norm, under(params, name)) for name in ("hidden_norm", "token_norm", "final_norm")
        )
        self.from_hidden, self.from_token = params["from_hidden"], params["from_token"]
        self.block = block

    def join(self, hidden_BTD: jax.Array, token_BTD: jax.Array) -> jax.Array:
        """What the block takes, [B, T, D]: of the module before (after its final norm) and of embedded tokens."""
        parts = ((self.hidden_norm, self.from_hidden, hidden_BTD), (self.token_norm, self.from_token, token_BTD))
        mine, theirs = (jnp.einsum("BTD,DE->BTE", norm(x), kernel[...].astype(x.dtype)) for norm, kernel, x in parts)
        return mine + theirs


def ahead(x_BT: jax.Array, k: int) -> jax.Array:
    """`x` k places on in the row [B, T, ...]; zeros behind its end. Rows are as they are stored."""
    x_BT = in_order(x_BT)
    return as_stored(jnp.concatenate([x_BT[:, k:], jnp.zeros_like(x_BT[:, :k])], axis=1))


def goes_on(segments_BT: jax.Array, k: int) -> jax.Array:
    """Where a position's document has k more tokens in the row, bool [B, T]. segments: 0 is padding."""
    return (segments_BT != 0) & (ahead(segments_BT, k) == segments_BT)
