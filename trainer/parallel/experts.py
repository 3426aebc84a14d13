"""Experts over the mesh: rows travel to the devices that hold their experts, weights never do. It knows no model.

B sequences, T tokens, K choices of a token, M = B x T x K choices of a device, E experts, W devices along the axis
`expert`, each with E / W neighbouring experts, R rows a device has room for, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from trainer.parallel.sharding import Layout, current_layout

EXPERT: Final = "expert"
HIDDEN: Final = ("tensor", "tensor_sequence")

Arrays = Mapping[str, jax.Array]
GroupedMlp = Callable[[jax.Array, jax.Array, jax.Array, Arrays], jax.Array]
"""(rows [M, D] sorted by expert, expert of each row [M], rows of each expert [E], weights [E, ...]) -> [M, D]."""
Combine = Callable[[jax.Array, jax.Array], jax.Array]
"""(results of the choices [B, T, K, D], their float32 weights [B, T, K]) -> weighted sum [B, T, D]."""


class Expert(NamedTuple):
    """What is computed; how it is spread is this module's."""

    mlp: GroupedMlp
    combine: Combine


class Choices(NamedTuple):
    experts: jax.Array  # int32 [B, T, K]
    weights: jax.Array  # float32 [B, T, K]
    valid: jax.Array  # bool [B, T]; padding chooses no expert


@dataclass(frozen=True)
class Placed:
    """Where one weight of the experts lies: logical axes of one layer's tensor, and its path for rules of its own."""

    axes: tuple[str, ...]
    path: str | None


def mix(x_BTD: jax.Array, choices: Choices, weights: Arrays, expert: Expert) -> jax.Array:
    """Every choice is computed once: rows sorted by expert, one grouped matmul for all experts. [B, T, D], on one device."""
    experts = next(iter(weights.values())).shape[0]
    return _mixed(x_BTD, choices, experts, lambda rows, ids, sizes: expert.mlp(rows, ids, sizes, weights), expert.combine)


def mix_over_mesh(
    layout: Layout, x_BTD: jax.Array, choices: Choices, weights: Arrays, placed: Mapping[str, Placed], expert: Expert
) -> jax.Array:
    """What `mix` gives, in the dtype of x, each device on its own tokens, experts and part of the experts' hidden dim.

    Experts split over `expert` stay where they are: an all-to-all brings rows to them and back. What splits weights only to
    be stored (`fsdp`) is gathered for the device's own experts, and their gradient is reduced and scattered the same way.
    """
    plan = _plan(layout, x_BTD.shape, weights, placed)
    body = partial(_device, plan, expert)
    tokens = plan.tokens
    specs = (tokens, tokens, plan.specs)
    # Without tracking of what varies over which axes, as kernels and collectives inside do not all take part in it.
    mapped = jax.shard_map(body, mesh=layout.mesh, in_specs=specs, out_specs=tokens, check_vma=False)
    return mapped(x_BTD, choices, dict(weights))


def by_token(function: Callable[..., Any], by_tokens: jax.Array, *others: Any) -> Any:
    """`function(by_tokens [B, T, ...], *others)`, a tree of arrays [B, T, ...]: every device for its own tokens.

    Left to itself, the partitioner gathers the tokens of all devices where the best of something are chosen.
    """
    layout = current_layout()
    if layout is None or layout.mesh.size == 1:
        return function(by_tokens, *others)
    tokens = layout.spec(("batch", "length"), by_tokens.shape[:2])
    specs = (tokens, *[PartitionSpec()] * len(others))
    return jax.shard_map(function, mesh=layout.mesh, in_specs=specs, out_specs=tokens, check_vma=False)(by_tokens, *others)


@dataclass(frozen=True)
class _Plan:
    tokens: PartitionSpec  # of [B, T, ...]
    specs: dict[str, PartitionSpec]  # of the weights, as they come in
    gather: dict[str, tuple[tuple[str, ...], ...]]  # mesh axes of each dim that are gathered before use
    hidden: tuple[str, ...]  # mesh axes that split the hidden dim
    experts: int
    ways: int  # devices that share the experts
    travel: bool  # tokens are split over `expert` too: their rows travel; else every device computes its experts' part
    native: bool  # the hardware has a ragged all-to-all


def _plan(layout: Layout, shape: Sequence[int], weights: Arrays, placed: Mapping[str, Placed]) -> _Plan:
    tokens = layout.spec(("batch", "length"), shape[:2])
    entries = {
        name: _entries(layout.spec(placed[name].axes, array.shape, placed[name].path), array.ndim) for name, array in weights.items()
    }
    if layout.inside_stage:  # a pipeline gathers weights itself
        entries = {name: tuple(tuple(axis for axis in dim if axis in (EXPERT, *HIDDEN)) for dim in dims) for name, dims in entries.items()}
    # The hidden dim stays split where that is the same part of it in all weights, over devices that have the same tokens.
    rows = {axis for dim in _entries(tokens, 2) for axis in dim}
    hidden = {dims[placed[name].axes.index("mlp")] for name, dims in entries.items() if "mlp" in placed[name].axes}
    shared = tuple(axis for axis in hidden.pop() if axis in HIDDEN and axis not in rows) if len(hidden) == 1 else ()
    split = all(dims[0] == (EXPERT,) for dims in entries.values())
    experts = next(iter(weights.values())).shape[0]

    def gathered(name: str, dim: int) -> tuple[str, ...]:
        kept = (EXPERT,) if dim == 0 and split else shared if placed[name].axes[dim] == "mlp" else ()
        return tuple(axis for axis in entries[name][dim] if axis not in kept)

    return _Plan(
        tokens=tokens,
        specs={name: PartitionSpec(*[dim or None for dim in dims]) for name, dims in entries.items()},
        gather={name: tuple(gathered(name, dim) for dim in range(len(dims))) for name, dims in entries.items()},
        hidden=shared,
        experts=experts,
        ways=layout.mesh.shape[EXPERT] if split else 1,
        travel=any(EXPERT in dim for dim in _entries(tokens, 2)),
        native=layout.mesh.devices.flat[0].platform == "tpu",
    )


def _entries(spec: PartitionSpec, rank: int) -> tuple[tuple[str, ...], ...]:
    dims = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
    return (*dims, *[()] * (rank - len(dims)))


def _device(plan: _Plan, expert: Expert, x_BTD: jax.Array, choices: Choices, weights: Arrays) -> jax.Array:
    """One device's part, within `shard_map`."""
    whole = {name: _gather(array, plan.gather[name]) for name, array in weights.items()}
    if plan.hidden and "down_bias" in whole:  # the parts of the hidden dim are added up; a bias is added once
        whole["down_bias"] = jnp.where(jax.lax.axis_index(plan.hidden) == 0, whole["down_bias"], 0)

    def local(rows_MD: jax.Array, expert_M: jax.Array, sizes_E: jax.Array) -> jax.Array:
        return expert.mlp(rows_MD, expert_M, sizes_E, whole)

    if plan.ways == 1:
        y_BTD = _mixed(x_BTD, choices, plan.experts, local, expert.combine)
    elif plan.travel:
        own = plan.experts // plan.ways
        chunk = choices.valid.size * min(choices.experts.shape[-1], own)
        y_BTD = _mixed(x_BTD, choices, plan.experts, lambda rows, ids, sizes: _visit(plan, chunk, local, rows, sizes), expert.combine)
    else:
        own = plan.experts // plan.ways
        mine_BTK = choices.experts - jax.lax.axis_index(EXPERT) * own
        mine_BTK = jnp.where((mine_BTK >= 0) & (mine_BTK < own), mine_BTK, own)
        y_BTD = _mixed(x_BTD, choices._replace(experts=mine_BTK), own, local, expert.combine)
    summed = (*plan.hidden, *([EXPERT] if plan.ways > 1 and not plan.travel else []))
    return jax.lax.psum(y_BTD, summed) if summed else y_BTD


def _gather(array: jax.Array, by_dim: Sequence[tuple[str, ...]]) -> jax.Array:
    for dim, axes in enumerate(by_dim):
        if axes:
            array = jax.lax.all_gather(array, axes, axis=dim, tiled=True)
    return array


def _mixed(
    x_BTD: jax.Array,
    choices: Choices,
    experts: int,
    grouped: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    combine: Combine,
) -> jax.Array:
    """[B, T, D]. Choices whose expert is `experts` or whose token is padding are nobody's and add nothing."""
    B, T, D = x_BTD.shape
    K = choices.experts.shape[-1]
    expert_M = jnp.where(choices.valid[..., None], choices.experts, experts).reshape(-1)
    order_M = jnp.argsort(expert_M, stable=True)
    inverse_M = jnp.argsort(order_M)
    rows_MD = permute(jnp.broadcast_to(x_BTD[:, :, None, :], (B, T, K, D)).reshape(-1, D), order_M, inverse_M)
    sizes_E = jnp.bincount(expert_M, length=experts).astype(jnp.int32)
    out_MD = permute(grouped(rows_MD, expert_M[order_M], sizes_E), inverse_M, order_M)
    return combine(out_MD.reshape(B, T, K, D), jnp.where(choices.valid[..., None], choices.weights, 0))


def _visit(
    plan: _Plan,
    chunk: int,
    local: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    rows_MD: jax.Array,
    sizes_E: jax.Array,
) -> jax.Array:
    """Rows sorted by expert go to the devices of their experts, through the MLP there, and come back to their places.

    chunk: the most rows one device can send another. A device has room for that from everyone: nothing is ever dropped.
    """
    ways, own = plan.ways, plan.experts // plan.ways
    here = jax.lax.axis_index(EXPERT)
    sizes_WWE = jax.lax.all_gather(sizes_E, EXPERT).reshape(ways, ways, own)  # [from, to, expert there]
    sent_WW = jnp.sum(sizes_WWE, axis=-1)
    begins_WW = jnp.cumsum(sent_WW, axis=1) - sent_WW  # among the sender's rows
    lands_WW = jnp.cumsum(sent_WW, axis=0) - sent_WW  # among the receiver's
    room = ways * chunk
    there = Route(begins_WW[here], sent_WW[here], lands_WW[here], sent_WW[:, here])
    back = Route(lands_WW[:, here], sent_WW[:, here], begins_WW[:, here], sent_WW[here])
    arrived_RD = exchange(rows_MD, there, room=room, chunk=chunk, native=plan.native)
    sizes_WE = sizes_WWE[:, here]
    group_R = jnp.searchsorted(jnp.cumsum(sizes_WE.reshape(-1)), jnp.arange(room), side="right")
    expert_R = jnp.where(group_R < ways * own, group_R % own, own)
    order_R = jnp.argsort(expert_R, stable=True)
    inverse_R = jnp.argsort(order_R)
    done_RD = local(permute(arrived_RD, order_R, inverse_R), expert_R[order_R], jnp.sum(sizes_WE, axis=0))
    return exchange(permute(done_RD, inverse_R, order_R), back, room=rows_MD.shape[0], chunk=chunk, native=plan.native)


class Route(NamedTuple):
    """Whose rows go where, int32 [W] each, as `jax.lax.ragged_all_to_all` takes them; what arrives is in order of senders, without gaps."""

    begins: jax.Array  # here, of the rows for each device
    sent: jax.Array  # number of those
    lands: jax.Array  # where they begin there
    arrives: jax.Array  # number of rows from each device


def exchange(rows_MD: jax.Array, route: Route, *, room: int, chunk: int, native: bool) -> jax.Array:
    """The rows that other devices sent this one, [room, D]; what follows them is zeros.

    native: by a ragged all-to-all, which sends what there is. Without one, chunks of one size are sent: `chunk` rows.
    """
    if native:
        return jax.lax.ragged_all_to_all(rows_MD, jnp.zeros((room, rows_MD.shape[1]), rows_MD.dtype), *route, axis_name=EXPERT)
    place_C = jnp.arange(chunk)
    taken_WC = jnp.minimum(route.begins[:, None] + place_C[None], rows_MD.shape[0] - 1)
    full_WC = place_C[None] < route.sent[:, None]
    chunks_WCD = jnp.where(full_WC[..., None], rows_MD[taken_WC], 0)
    arrived_WCD = jax.lax.all_to_all(chunks_WCD, EXPERT, split_axis=0, concat_axis=0)
    ends_W = jnp.cumsum(route.arrives)
    place_R = jnp.arange(room)
    sender_R = jnp.minimum(jnp.searchsorted(ends_W, place_R, side="right"), len(ends_W) - 1)
    within_R = jnp.minimum(place_R - (ends_W - route.arrives)[sender_R], chunk - 1)
    return jnp.where((place_R < ends_W[-1])[:, None], arrived_WCD[sender_R, within_R], 0)


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """`x[order]`; with the inverse permutation at hand its gradient is a gather too, not a scatter."""
    del inverse
    return x[order]


def _permute_forward(x: jax.Array, order: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x[order], inverse


def _permute_backward(inverse: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None, None]:
    return gradient[inverse], None, None


permute.defvjp(_permute_forward, _permute_backward)
