"""Norm, gated MLP, token embedding: the small parts of a block.

B sequences, T tokens, D model width, F MLP hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from trainer.config.model import Clamp, GatedMlp, Moe
from trainer.config.model import Norm as NormSpec
from trainer.parallel.sharding import constrain

Params = Mapping[str, nnx.Param]
Precision = Literal["default", "highest"]

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


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rows_times_kernel(x_ND: jax.Array, kernel_DV: jax.Array, precision: Precision) -> jax.Array:
    """The product of rows and a kernel of their dtype as float32 [N, V].

    The kernel's gradient is made in the kernel's own order of dims. JAX's own comes transposed; once it is summed over a mesh
    that cannot be undone for nothing, and the norm and every pass of the optimizer would read it across its rows.
    Narrow operands are treated as by `einsum_float32`.
    """
    return jnp.einsum("ND,DV->NV", x_ND, kernel_DV, precision=precision, preferred_element_type=jnp.float32)


def _rows_forward(x_ND: jax.Array, kernel_DV: jax.Array, precision: Precision) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return rows_times_kernel(x_ND, kernel_DV, precision), (x_ND, kernel_DV)


def _rows_backward(precision: Precision, operands: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_ND, kernel_DV = operands
    gradient_NV = gradient.astype(x_ND.dtype)
    by_rows = jnp.einsum("NV,DV->ND", gradient_NV, kernel_DV, precision=precision)
    return by_rows, jnp.einsum("ND,NV->DV", x_ND, gradient_NV, precision=precision)


rows_times_kernel.defvjp(_rows_forward, _rows_backward)


class RmsNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + epsilon) * (offset + scale)` over the trailing dims that `scale` has, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, spec: NormSpec, params: Params) -> None:
        self.epsilon, self.offset = spec.epsilon, spec.offset
        self.scale = params["scale"]

    def __call__(self, x: jax.Array) -> jax.Array:
        x_float32, scale = x.astype(jnp.float32), self.scale[...]
        if self.offset:
            scale = scale + self.offset
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x_float32), axis=tuple(range(-scale.ndim, 0)), keepdims=True) + self.epsilon)
        return (x_float32 * inverse * jnp.expand_dims(scale, range(x.ndim - scale.ndim))).astype(x.dtype)


class Mlp(nnx.Module):
    """`down(activation(gate(x)) * up(x))` (Shazeer 2020), or GPT-OSS's clamped form of it."""

    def __init__(self, spec: GatedMlp, params: Params) -> None:
        self.spec = spec
        self.gate, self.up, self.down = params["gate"], params["up"], params["down"]
        self.gate_bias, self.up_bias, self.down_bias = params.get("gate_bias"), params.get("up_bias"), params.get("down_bias")

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF = checkpoint_name(add_bias(jnp.einsum("BTD,DF->BTF", x_BTD, self.gate[...]), self.gate_bias), "mlp_gate")
        up_BTF = checkpoint_name(add_bias(jnp.einsum("BTD,DF->BTF", x_BTD, self.up[...]), self.up_bias), "mlp_up")
        hidden_BTF = constrain(gated(gate_BTF, up_BTF, self.spec), ("batch", "length", "act_mlp"))
        return checkpoint_name(add_bias(jnp.einsum("BTF,FD->BTD", hidden_BTF, self.down[...]), self.down_bias), "mlp_down")


def gated(gate: jax.Array, up: jax.Array, spec: GatedMlp | Moe) -> jax.Array:
    """What an MLP's down projection takes, of the results of its gate and up projections."""
    match spec.clamp:
        case None:
            return ACTIVATIONS[spec.activation](gate) * up
        case Clamp(limit=limit, slope=slope):
            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
            return (up + 1) * gate * jax.nn.sigmoid(slope * gate)


def lookup(table_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of the table in `dtype`, [B, T, D]; NaN for an id outside of the vocabulary.

    Cast after the lookup, so that the gradient, where a frequent token adds up thousands of rows, is summed in the
    table's dtype. A sharded table is not gathered: ids go to the devices that hold a part of the width, and the rows (in
    the backward pass their gradient) change between a part of the width and a part of the batch. Left to itself, the
    partitioner finds no such way where the vocabulary is split too, and makes all gradients of all rows whole on every
    device.
    """
    table_VD = constrain(table_VD, ("vocab", "embed"), "embed/table")
    tokens_BT = constrain(tokens_BT, ("rows", None))
    rows_BTD = table_VD.at[tokens_BT].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False).astype(dtype)
    rows_BTD = constrain(rows_BTD, ("rows", None, "embed"), "embed/table")
    return constrain(rows_BTD, ("rows", "length", "embed"), "embed/table")  # one exchange at a time: the partitioner finds no way for two
