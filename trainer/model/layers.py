"""Norm, rotary embedding, gated MLP, token embedding: the small parts of a block.

B sequences, T tokens, N heads, H head dim (H/2 = half of it), D model width, F MLP hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import jax
import jax.numpy as jnp
from flax import nnx

from trainer.config.model import GatedMlp, Rope
from trainer.config.model import Norm as NormSpec
from trainer.parallel.sharding import constrain

Params = Mapping[str, nnx.Param]

ACTIVATIONS: Final[dict[str, Callable[[jax.Array], jax.Array]]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


def under(params: Params, name: str) -> dict[str, nnx.Param]:
    """The parameters whose path begins with `name/`, by the rest of their path."""
    prefix = f"{name}/"
    return {path.removeprefix(prefix): param for path, param in params.items() if path.startswith(prefix)}


def select(valid_BT: jax.Array, x: jax.Array) -> jax.Array:
    """`x` [B, T, ...] where valid, exact zeros in padding: neither a value nor a gradient passes there."""
    return jnp.where(jnp.expand_dims(valid_BT, range(2, x.ndim)), x, jnp.zeros((), x.dtype))


def add_bias(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """`x + bias` over the trailing dims, in the dtype of `x`; `x` itself without a bias."""
    if bias is None:
        return x
    return x + jnp.expand_dims(bias[...].astype(x.dtype), range(x.ndim - bias[...].ndim))


def einsum_float32(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """The product of two arrays of one dtype as float32.

    The gradient's products take narrower operands as they are, with the cotangent in their dtype: left to itself, JAX
    widens them to float32 to meet the cotangent, and a sharded kernel is gathered a second time, in twice the bytes.
    """
    return jnp.einsum(subscripts, x, y) if x.dtype == jnp.float32 else _narrow_einsum(subscripts, x, y)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _narrow_einsum(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _narrow_einsum_forward(subscripts: str, x: jax.Array, y: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _narrow_einsum(subscripts, x, y), (x, y)


def _narrow_einsum_backward(subscripts: str, operands: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, ...]:
    _, transpose = jax.vjp(partial(jnp.einsum, subscripts), *operands)
    return transpose(gradient.astype(operands[0].dtype))


_narrow_einsum.defvjp(_narrow_einsum_forward, _narrow_einsum_backward)


class RmsNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + epsilon) * scale` over the last dim, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, spec: NormSpec, params: Params) -> None:
        self.epsilon = spec.epsilon
        self.scale = params["scale"]

    def __call__(self, x: jax.Array) -> jax.Array:
        x_float32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x_float32), axis=-1, keepdims=True) + self.epsilon)
        return (x_float32 * inverse * jnp.expand_dims(self.scale[...], range(x.ndim - 1))).astype(x.dtype)


class Mlp(nnx.Module):
    """`down(activation(gate(x)) * up(x))` (Shazeer 2020)."""

    def __init__(self, spec: GatedMlp, params: Params) -> None:
        self.activation = spec.activation
        self.gate, self.up, self.down = params["gate"], params["up"], params["down"]
        self.gate_bias, self.up_bias, self.down_bias = params.get("gate_bias"), params.get("up_bias"), params.get("down_bias")

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF = add_bias(jnp.einsum("BTD,DF->BTF", x_BTD, self.gate[...]), self.gate_bias)
        up_BTF = add_bias(jnp.einsum("BTD,DF->BTF", x_BTD, self.up[...]), self.up_bias)
        hidden_BTF = constrain(ACTIVATIONS[self.activation](gate_BTF) * up_BTF, ("batch", "length", "act_mlp"))
        return add_bias(jnp.einsum("BTF,FD->BTD", hidden_BTF, self.down[...]), self.down_bias)


def rope_frequencies(spec: Rope, head_dim: int) -> list[float]:
    """Radians per position of each of the head_dim / 2 rotated pairs, with Llama 3.1's scaling where asked for.

    Frequencies whose wavelength exceeds original_length / low_freq_factor are divided by `factor`, those below
    original_length / high_freq_factor are kept, linear in original_length / wavelength between the two
    (Llama 3.1 reference code, `apply_scaling`).
    """
    frequencies = [spec.theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    scaling = spec.scaling
    if scaling is None:
        return frequencies

    def scaled(frequency: float) -> float:
        turns = scaling.original_length * frequency / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = min(max(kept, 0.0), 1.0)
        return frequency * (kept + (1 - kept) / scaling.factor)

    return [scaled(frequency) for frequency in frequencies]


def rope_table(positions_BT: jax.Array, spec: Rope, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of position times frequency: two float32 arrays [B, T, H/2]."""
    frequencies = jnp.asarray(rope_frequencies(spec, head_dim), jnp.float32)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding (Su et al. 2021) with the two halves of the head dim as pairs, computed in float32."""
    cos, sin = (half[:, :, None, :] for half in table)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def lookup(table_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of the table in `dtype`, [B, T, D]; NaN for an id outside of the vocabulary.

    Cast after the lookup, so that the gradient, where a frequent token adds up thousands of rows, is summed in the
    table's dtype. A sharded table is not gathered: the partitioner moves ids and rows.
    """
    return table_VD.at[tokens_BT].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False).astype(dtype)
