"""A mixture of gated experts.

B sequences, T tokens, N = B x T, K experts of a token, M = N x K choices, E experts, C room of an expert in a sequence,
D model width, F hidden width of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from trainer.config.model import Capacity, DenseDispatch, Dropless, ExpertKernel, GatedMlp, Moe
from trainer.model.grouped import grouped_product
from trainer.model.layers import Mlp, Params, add_bias, einsum_float32, gated, select, under
from trainer.model.routing import Routing, chosen_experts, load_balance_sum, route, z_loss_sum
from trainer.parallel.context import as_stored, in_order
from trainer.parallel.experts import Choices, Expert, Placed, by_token, mix, mix_over_mesh
from trainer.parallel.sharding import constrain, current_layout

Arrays = Mapping[str, jax.Array]


class MixtureOfExperts(nnx.Module):
    """Router, experts, and the shared expert where there is one."""

    def __init__(self, spec: Moe, params: Params) -> None:
        self.spec = spec
        self.router = nnx.Dict(under(params, "router"))
        self.experts = nnx.Dict(under(params, "experts"))
        self.shared = _shared(spec, under(params, "shared"))

    def __call__(
        self, x_BTD: jax.Array, valid_BT: jax.Array, *, dropless: bool = False, kernel: ExpertKernel = "auto"
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The mixture's output and, as by-products, float32 sums over tokens that are not padding: `load_balance` and
        `router_z_loss` (scalars, not weighted), `load` [E] (choices that fell on each expert) and `dropped` (choices without room).

        dropless: no choice is dropped, whatever the spec says. kernel: of the products of dropless experts.
        """
        routing = self.route(x_BTD)
        taken_BTE = chosen_experts(routing.experts, self.spec.experts, valid_BT)
        experts = {name: param[...] for name, param in self.experts.items()}
        match self.spec.dispatch:
            case Capacity(factor=factor) if not dropless:
                y_BTD, dropped = with_capacity(x_BTD, routing, valid_BT, experts, self.spec, factor)
            case DenseDispatch():
                y_BTD, dropped = dense(x_BTD, routing, valid_BT, experts, self.spec), jnp.zeros(())
            case Dropless() | Capacity():
                y_BTD, dropped = sparse(x_BTD, routing, valid_BT, self.experts, self.spec, kernel), jnp.zeros(())
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        return y_BTD, {
            "load_balance": load_balance_sum(routing, taken_BTE, valid_BT),
            "router_z_loss": z_loss_sum(routing, valid_BT),
            "load": jnp.sum(taken_BTE, axis=(0, 1)),
            "dropped": dropped,
        }

    def route(self, x_BTD: jax.Array) -> Routing:
        """In float32, from float32 weights: the choice must not depend on how the experts are computed."""
        kernel_DE = self.router["kernel"][...].astype(jnp.float32)
        logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), kernel_DE, precision=jax.lax.Precision.HIGHEST)
        balance = self.router.get("balance")
        others = () if balance is None else (balance[...],)
        return by_token(
            lambda logits_BTE, *others: route(logits_BTE, self.spec, *others), add_bias(logits_BTE, self.router.get("bias")), *others
        )


def _shared(spec: Moe, params: Params) -> Mlp | None:
    if spec.shared_hidden is None:
        return None
    return Mlp(GatedMlp(hidden=spec.shared_hidden, activation=spec.activation, clamp=spec.clamp), params)


def dense(x_BTD: jax.Array, routing: Routing, valid_BT: jax.Array, experts: Arrays, spec: Moe) -> jax.Array:
    """Every expert computes every token: the reference the other forms are held against. Returns [B, T, D]."""
    hot_BTKE = jax.nn.one_hot(routing.experts, spec.experts, dtype=jnp.float32)
    combine_BTE = select(valid_BT, jnp.einsum("BTK,BTKE->BTE", routing.weights, hot_BTKE))
    hidden_BTEF = gated(
        _plus(jnp.einsum("BTD,EDF->BTEF", x_BTD, experts["gate"]), experts.get("gate_bias")),
        _plus(jnp.einsum("BTD,EDF->BTEF", x_BTD, experts["up"]), experts.get("up_bias")),
        spec,
    )
    out_BTED = _plus(jnp.einsum("BTEF,EFD->BTED", hidden_BTEF, experts["down"]), experts.get("down_bias"))
    return einsum_float32("BTED,BTE->BTD", out_BTED, combine_BTE.astype(out_BTED.dtype)).astype(x_BTD.dtype)


def sparse(
    x_BTD: jax.Array,
    routing: Routing,
    valid_BT: jax.Array,
    experts: Mapping[str, nnx.Param],
    spec: Moe,
    kernel: ExpertKernel = "auto",
) -> jax.Array:
    """Every choice is computed once, by the devices that hold its expert (`trainer.parallel.experts`). Returns [B, T, D].

    Padding chooses no expert.
    """
    choices = Choices(routing.experts, routing.weights, valid_BT)
    arrays = {name: param[...] for name, param in experts.items()}

    def combine(out_BTKD: jax.Array, weights_BTK: jax.Array) -> jax.Array:
        return einsum_float32("BTKD,BTK->BTD", out_BTKD, weights_BTK.astype(out_BTKD.dtype)).astype(x_BTD.dtype)

    expert = Expert(partial(grouped_mlp, spec=spec, kernel=kernel), combine)
    layout = current_layout()
    if layout is None or layout.mesh.size == 1:
        return mix(x_BTD, choices, arrays, expert)
    # The axes of a stacked weight begin with those of its layers.
    placed = {name: Placed(tuple(param.axes[-param[...].ndim :]), param.path) for name, param in experts.items()}
    return mix_over_mesh(layout, x_BTD, choices, arrays, placed, expert)


def with_capacity(
    x_BTD: jax.Array, routing: Routing, valid_BT: jax.Array, experts: Arrays, spec: Moe, factor: float
) -> tuple[jax.Array, jax.Array]:
    """Each expert has room for C = ceil(factor * T * K / E) choices of a sequence, taken in order of tokens and, of one token,
    of its choices; the rest add nothing (Lepikhin et al. 2020). Returns [B, T, D] and the number of choices dropped.
    """
    T, K = routing.experts.shape[1:]
    room = min(math.ceil(factor * T * K / spec.experts), T)
    hot_BTKE = jax.nn.one_hot(routing.experts, spec.experts, dtype=jnp.float32) * valid_BT[..., None, None]
    flat_BME = in_order(hot_BTKE).reshape(hot_BTKE.shape[0], T * K, spec.experts)
    place_BTK = as_stored(jnp.sum((jnp.cumsum(flat_BME, axis=1) - 1) * flat_BME, axis=-1).reshape(-1, T, K))
    kept_BTKE = jnp.where((place_BTK < room)[..., None], hot_BTKE, 0)
    slot_BTKC = jax.nn.one_hot(place_BTK.astype(jnp.int32), room, dtype=jnp.float32)
    dispatch_BTEC = jnp.einsum("BTKE,BTKC->BTEC", kept_BTKE, slot_BTKC)
    combine_BTEC = jnp.einsum("BTK,BTKE,BTKC->BTEC", routing.weights, kept_BTKE, slot_BTKC)
    axes = ("act_expert", "batch", None, None)
    rows_EBCD = constrain(jnp.einsum("BTEC,BTD->EBCD", dispatch_BTEC.astype(x_BTD.dtype), x_BTD), axes)

    def bias(name: str) -> jax.Array | None:
        return None if name not in experts else experts[name][:, None, None, :]

    hidden_EBCF = gated(
        _plus(jnp.einsum("EBCD,EDF->EBCF", rows_EBCD, experts["gate"]), bias("gate_bias")),
        _plus(jnp.einsum("EBCD,EDF->EBCF", rows_EBCD, experts["up"]), bias("up_bias")),
        spec,
    )
    out_EBCD = constrain(_plus(jnp.einsum("EBCF,EFD->EBCD", hidden_EBCF, experts["down"]), bias("down_bias")), axes)
    y_BTD = einsum_float32("EBCD,BTEC->BTD", out_EBCD, combine_BTEC.astype(out_EBCD.dtype)).astype(x_BTD.dtype)
    return y_BTD, jnp.sum(hot_BTKE) - jnp.sum(kept_BTKE)


def grouped_mlp(
    rows_MD: jax.Array, expert_M: jax.Array, sizes_E: jax.Array, experts: Arrays, spec: Moe, kernel: ExpertKernel = "auto"
) -> jax.Array:
    """The MLP of each row's expert: rows sorted by expert, `sizes_E` of each; what follows them belongs to none and gives zeros."""
    mine_M1 = (jnp.arange(rows_MD.shape[0]) < jnp.sum(sizes_E))[:, None]
    rows_MD = jnp.where(mine_M1, rows_MD, 0)
    expert_M = jnp.minimum(expert_M, sizes_E.shape[0] - 1)

    def project(rows: jax.Array, name: str) -> jax.Array:
        out = grouped_product(rows, experts[name], sizes_E.astype(jnp.int32), kernel)
        bias = experts.get(f"{name}_bias")
        return out if bias is None else out + bias[expert_M].astype(out.dtype)

    hidden_MF = jnp.where(mine_M1, gated(project(rows_MD, "gate"), project(rows_MD, "up"), spec), 0)
    return jnp.where(mine_M1, project(hidden_MF, "down"), 0)


def _plus(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    return x if bias is None else x + jnp.expand_dims(bias.astype(x.dtype), range(x.ndim - bias.ndim))
