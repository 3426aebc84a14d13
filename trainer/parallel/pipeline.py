"""Layers as a pipeline over the mesh axis `stage`. It knows no model: a stage is a function, weights are arrays.

S stages, R repeats, P patterns per stage, M microbatches of b rows in K = M / S lanes, B = M x b rows, N iterations. What
happens when is read from `trainer.config.pipeline_schedule`, whose tables are scanned over. All stages are computed by
one function mapped over a leading dim of size S, split over `stage`; results move to the next stage by rolling that dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.sharding import NamedSharding, PartitionSpec

from trainer.config.pipeline import PipelinePlan
from trainer.config.pipeline_schedule import PipelineSchedule
from trainer.parallel.sharding import Layout, constrain, current_layout, use_layout

STAGE: Final = "stage"
FSDP: Final = ("fsdp", "fsdp_transpose")

INPUT: Final = "pipeline_input"
"""Name of the stages' inputs, for what the backward pass keeps."""
MOVES: Final = ("broadcast_in_dim", "convert_element_type", "dynamic_slice", "gather", "name", "reshape", "sharding_constraint",
                "slice", "squeeze", "transpose")  # fmt: skip
"""Primitives that compute nothing: what makes a stage's weights of the stored ones, anew in the backward pass under every policy."""

Rows = Any
"""A tree of arrays with one entry for each row of the batch: [B, ...]."""
Use = Callable[[list[jax.Array]], list[jax.Array]]
"""Weights as a stage is given them, of all its patterns or of one -> as it computes with them: whole, in compute dtype."""
Stage = Callable[[list[jax.Array], Use, jax.Array, Rows], tuple[jax.Array, Any]]
"""(weights [P, ...], use, x [b, ...], rows [b, ...]) -> x of the same shape, and by-products: a tree of float arrays [P, ...]."""
Policy = Callable[..., bool]


@dataclass(frozen=True)
class StageWeight:
    """One weight of all stages as it is stored, and how it is used."""

    stored: jax.Array  # [R, S, P, ...]
    axes: tuple[str, ...]  # logical axes: repeat, stage, layer, ...
    path: str
    dtype: jnp.dtype  # of the copy that stages compute with

    def with_array(self, stored: jax.Array, axes: tuple[str, ...]) -> StageWeight:
        return replace(self, stored=stored, axes=axes)


class Turn(NamedTuple):
    """What the schedule says about one iteration; leading dim N where all of them are meant."""

    repeat: Any  # int32 [S]
    microbatch: Any  # int32 [S]
    active: Any  # bool [S]; False in a bubble
    read: Any  # int32: lane that stage 0 reads
    write: Any  # int32: lane that the last stage's result goes to
    writes: Any  # bool: there is such a result


def turns(schedule: PipelineSchedule) -> Turn:
    """The schedule as numpy arrays, one row a turn."""
    T, S = schedule.turns, schedule.stages
    work = [[schedule.work(t, s) for s in range(S)] for t in range(T)]
    return Turn(
        repeat=np.array([[w.repeat if w else 0 for w in row] for row in work], np.int32),
        microbatch=np.array([[w.microbatch if w else 0 for w in row] for row in work], np.int32),
        active=np.array([[w is not None for w in row] for row in work]),
        read=np.array([schedule.read_lane(t) for t in range(T)], np.int32),
        write=np.array([schedule.write_lane(t) for t in range(T)], np.int32),
        writes=np.array([schedule.written(t) is not None for t in range(T)]),
    )


def run_pipeline(
    stage: Stage,
    weights: Sequence[StageWeight],
    x: jax.Array,
    rows: Rows,
    plan: PipelinePlan,
    *,
    axes: tuple[str | None, ...],
    policy: Policy | None,
    idle: float = 0.0,
) -> tuple[jax.Array, Any]:
    """`x` [B, ...] after all pipelined layers, and the stages' by-products summed over microbatches: [R x S x P, ...].

    rows: what belongs to the rows of x; each stage gets those of its microbatch. axes: logical axes of x. policy: what
    the backward pass keeps of an iteration beside the stages' inputs; None keeps everything but weights. idle: what a
    stage hands on that has nothing to do; no result depends on it, whatever it is (the inputs of idle stages are
    replaced, so that not even NaN reaches a gradient).
    """
    schedule = plan.schedule
    S, table = schedule.stages, turns(schedule)
    buffer = constrain(_spread(x, schedule), (STAGE, None, *axes))
    by_microbatch = jax.tree.map(lambda leaf: _by_microbatch(leaf, schedule), rows)
    stage_index = np.arange(S)
    shape = (S, *buffer.shape[2:])
    keep = policy or _computed

    def compute(stored: list[StageWeight], whole: list[jax.Array] | None, x_Sb: jax.Array, turn: Turn) -> tuple[jax.Array, Any]:
        picked = [constrain(_pick(weight.stored, turn.repeat), weight.axes[1:], weight.path) for weight in stored]
        if whole is not None:
            own = [weight.with_array(array, weight.axes[1:]) for weight, array in zip(stored, picked, strict=True)]
            picked = [_whole_of_repeat(weight, mine, array, turn.repeat) for weight, mine, array in zip(stored, own, whole, strict=True)]
        own_rows = jax.tree.map(lambda leaf: constrain(leaf[turn.microbatch], (STAGE, "batch", *[None] * (leaf.ndim - 2))), by_microbatch)
        use = partial(_use, stored) if whole is None else _as_given
        y_Sb, products = _map_stages(partial(_with_use, stage, use))(picked, _select(turn.active, x_Sb, 0.0), own_rows)
        return _select(turn.active, y_Sb, idle), products

    def iterations(stored: list[StageWeight], whole: list[jax.Array] | None) -> Callable[[_Carry, Turn], tuple[_Carry, Any]]:
        def iteration(carry: _Carry, turn: Turn) -> tuple[_Carry, Any]:
            lane = jax.lax.dynamic_index_in_dim(carry.buffer, turn.read, 1, keepdims=False)
            inputs = checkpoint_name(_where_stage(stage_index == 0, lane, carry.arriving), INPUT)
            arrays = [weight.stored for weight in stored]
            body = jax.checkpoint(
                lambda arrays, whole, inputs, turn: compute(
                    [weight.with_array(array, weight.axes) for weight, array in zip(stored, arrays, strict=True)], whole, inputs, turn
                ),
                policy=keep,
                prevent_cse=False,
            )
            results, products = body(arrays, whole, constrain(inputs, (STAGE, *axes)), turn)
            results = constrain(results, (STAGE, *axes))
            leaving = results if carry.held is None else carry.held
            return move(carry.buffer, leaving, turn, held=results), products

        return iteration

    def move(buffer: jax.Array, leaving: jax.Array, turn: Turn, *, held: jax.Array | None) -> _Carry:
        """One lane turns towards stage 0, results go to the next stage, that of the last stage into the buffer."""
        lane = jax.lax.dynamic_index_in_dim(buffer, turn.read, 1, keepdims=False)
        buffer = jax.lax.dynamic_update_index_in_dim(buffer, _rotate(lane, -1), turn.read, 1)
        arriving = constrain(_rotate(leaving, 1), (STAGE, *axes))
        to = schedule.write_stage
        back = arriving if to == 0 else _rotate(leaving, to + 1) if to != S - 1 else leaving
        lane = jax.lax.dynamic_index_in_dim(buffer, turn.write, 1, keepdims=False)
        lane = _where_stage((stage_index == to) & turn.writes, back, lane)
        buffer = jax.lax.dynamic_update_index_in_dim(buffer, lane, turn.write, 1)
        return _Carry(constrain(buffer, (STAGE, None, *axes)), arriving, held if schedule.hop == 2 else None)

    empty = constrain(jnp.full(shape, idle, x.dtype), (STAGE, *axes))
    carry = _Carry(buffer, empty, empty if schedule.hop == 2 else None)
    rows_of = jax.tree.map(lambda array: jnp.asarray(array[: schedule.iterations]), table)
    match plan.gather:
        case "iteration":
            carry, products = jax.lax.scan(iterations(list(weights), None), carry, rows_of)
        case "once":
            carry, products = jax.lax.scan(iterations(list(weights), [_whole(weight) for weight in weights]), carry, rows_of)
        case "repeat":
            carry, products = _by_repeat(iterations, list(weights), carry, rows_of, schedule, policy)
    if schedule.hop == 2:
        assert carry.held is not None
        last = jax.tree.map(lambda array: jnp.asarray(array[-1]), table)
        carry = move(carry.buffer, carry.held, last, held=None)
    return constrain(_gather_rows(carry.buffer, schedule), axes), jax.tree.map(lambda leaf: _by_layer(leaf, schedule), products)


def _computed(primitive: Any, *avals: Any, **params: Any) -> bool:
    """Everything but weights."""
    return primitive.name not in MOVES


class _Carry(NamedTuple):
    buffer: jax.Array  # [S, K, b, ...]
    arriving: jax.Array  # [S, b, ...]: what the stage before handed on; not read at stage 0
    held: jax.Array | None  # [S, b, ...]: results that leave in the next iteration, with delayed forwarding


def _by_repeat(
    iterations: Callable[..., Any],
    weights: list[StageWeight],
    carry: _Carry,
    turn: Turn,
    schedule: PipelineSchedule,
    policy: Policy | None,
) -> tuple[_Carry, Any]:
    """The scan over iterations in windows of M, each with the whole weights of two repeats.

    In window k, stage s still has repeat k - 1 for its first hop x s iterations (fewer than M), then k. After R windows
    `drain` iterations are left, all of the last repeat. Only the stages' inputs, and what `policy` keeps, outlive a
    window: its backward pass gathers the weights of both repeats anew.
    """
    R, M = schedule.repeats, schedule.microbatches
    inputs, others = jax.checkpoint_policies.save_only_these_names(INPUT), policy or _computed

    # JAX's own union takes no policy that offloads.
    def keep(primitive: Any, *avals: Any, **params: Any) -> Any:
        return inputs(primitive, *avals, **params) or others(primitive, *avals, **params)

    axes = [weight.axes for weight in weights]

    def window(carry: _Carry, inputs: tuple[list[jax.Array], Turn]) -> tuple[_Carry, Any]:
        arrays, turn = inputs
        stored = [weight.with_array(array, axis) for weight, array, axis in zip(weights, arrays, axes, strict=True)]
        return jax.lax.scan(iterations(stored, [_whole(weight) for weight in stored]), carry, turn)

    def pair(stored: jax.Array) -> jax.Array:  # [R, 2, S, ...]: of each window the repeat before and its own
        return jnp.stack([jnp.concatenate([stored[:1], stored[:-1]]), stored], axis=1)

    first = jax.tree.map(lambda array: array[: R * M].reshape(R, M, *array.shape[1:]), turn)
    window_index = np.arange(R).reshape(R, 1, 1)
    first = first._replace(repeat=jnp.where(first.active, first.repeat - window_index + 1, 1))
    run = jax.checkpoint(window, policy=keep, prevent_cse=False)
    carry, products = jax.lax.scan(run, carry, ([pair(weight.stored) for weight in weights], first))
    products = jax.tree.map(lambda leaf: leaf.reshape(R * M, *leaf.shape[2:]), products)
    if schedule.drain:
        last = jax.tree.map(lambda array: array[R * M :], turn)
        last = last._replace(repeat=jnp.zeros_like(last.repeat))
        run = jax.checkpoint(window, policy=keep, prevent_cse=True)
        carry, rest = run(carry, ([weight.stored[-1:] for weight in weights], last))
        products = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), products, rest)
    return carry, products


def _map_stages(stage: Callable[..., Any]) -> Callable[..., Any]:
    """`stage` over a leading dim of size S of all arguments, split over the mesh axis."""
    layout = current_layout()
    if layout is None or layout.mesh.size == 1:
        return jax.vmap(stage)

    def inside(*arguments: Any) -> Any:
        with use_layout(replace(layout, inside_stage=True)):
            return stage(*arguments)

    return jax.vmap(inside, spmd_axis_name=STAGE)


def _with_use(stage: Stage, use: Use, arrays: list[jax.Array], x: jax.Array, rows: Rows) -> tuple[jax.Array, Any]:
    return stage(arrays, use, x, rows)


def _as_given(arrays: list[jax.Array]) -> list[jax.Array]:
    return arrays


def _use(weights: Sequence[StageWeight], arrays: list[jax.Array]) -> list[jax.Array]:
    """`arrays`, of `weights` a stage's or one pattern's as stored, gathered in compute dtype; within a stage.

    A gradient is brought into the stored layout and dtype before it is added up.
    """
    own = [weight.with_array(array, weight.axes[len(weight.axes) - array.ndim :]) for weight, array in zip(weights, arrays, strict=True)]
    return [_as_copy_of(weight, _whole(weight)) for weight in own]


def _whole_of_repeat(weight: StageWeight, own: StageWeight, whole: jax.Array, repeat_S: jax.Array) -> jax.Array:
    """The weight of each stage's repeat, [S, P, ...], out of the `whole` ones of all repeats. Gradients as in `_use`."""
    # Said of the whole weights too: left to itself, the partitioner splits them again at the border of a loop.
    return _as_copy_of(own, _gathered(own, _pick(_gathered(weight, whole), repeat_S)))


def _pick(array: jax.Array, repeat_S: jax.Array) -> jax.Array:
    """[R, S, ...] -> [S, ...]: of each stage the repeat it works on."""
    if array.shape[0] == 1:
        return array[0]
    return jax.vmap(lambda one, repeat: jax.lax.dynamic_index_in_dim(one, repeat, 0, keepdims=False), in_axes=(1, 0))(array, repeat_S)


def _whole(weight: StageWeight) -> jax.Array:
    """The weight in compute dtype, gathered over the mesh axes that split it only to be stored. No gradient passes.

    Mapped over stages, the dim that is gathered is the first one meanwhile: the parts then lie one behind the other, and are the
    whole as they arrive. Behind the dim of stages, of which a device has one, XLA on CPU copies the whole once more.
    """
    array = jax.lax.stop_gradient(weight.stored).astype(weight.dtype)
    array = constrain(array, weight.axes, weight.path)  # gathered in compute dtype
    layout = current_layout()
    if layout is None or not layout.inside_stage:
        return _gathered(weight, array)
    split, whole = _split(layout, weight), _split_when_whole(layout, weight)
    changed = [dim for dim, (before, after) in enumerate(zip(split, whole, strict=True)) if before != after]

    @custom_vmap
    def gathered(array: jax.Array) -> jax.Array:
        return _gathered(weight, array)

    @gathered.def_vmap
    def of_stages(axis_size: int, in_batched: list[bool], array_S: jax.Array) -> tuple[jax.Array, bool]:  # pyright: ignore[reportUnusedFunction]
        dim = changed[0] + 1 if changed else 0
        array_S = jnp.moveaxis(array_S, dim, 0)
        for entries in ([STAGE, *split], [STAGE, *whole]):
            spec = PartitionSpec(entries[dim], *entries[:dim], *entries[dim + 1 :])
            array_S = jax.lax.with_sharding_constraint(array_S, NamedSharding(layout.mesh, spec))
        return jnp.moveaxis(array_S, 0, dim), True

    return gathered(array)


def _gathered(weight: StageWeight, array: jax.Array) -> jax.Array:
    """`array`, a copy of the weight, laid out without the mesh axes that split it only to be stored."""
    layout = current_layout()
    if layout is None or layout.mesh.size == 1:
        return array
    spec = PartitionSpec(*_split_when_whole(layout, weight))
    return jax.lax.with_sharding_constraint(array, NamedSharding(layout.mesh, spec))


def _split(layout: Layout, weight: StageWeight) -> list[tuple[str, ...] | None]:
    """The mesh axes that split each dim of a weight."""
    spec = [(entry,) if isinstance(entry, str) else entry for entry in layout.spec(weight.axes, weight.stored.shape, weight.path)]
    return spec + [None] * (len(weight.axes) - len(spec))


def _split_when_whole(layout: Layout, weight: StageWeight) -> list[tuple[str, ...] | None]:
    """Those of them that split it while a stage computes with it."""
    entries: list[tuple[str, ...] | None] = []
    for logical, mesh_axes in zip(weight.axes, _split(layout, weight), strict=True):
        kept = () if logical == "embed" else tuple(axis for axis in mesh_axes or () if axis not in FSDP)
        entries.append(kept or None)
    return entries


def _as_copy_of(weight: StageWeight, used: jax.Array) -> jax.Array:
    """`used`, whose gradient goes to `weight.stored`, in its layout and dtype."""
    dtype, layout = weight.stored.dtype, current_layout()

    @jax.custom_vjp
    def copy(stored: jax.Array, used: jax.Array) -> jax.Array:
        del stored
        return used

    def backward(_: None, gradient: jax.Array) -> tuple[jax.Array, None]:
        with use_layout(layout):  # of the place in the forward pass: within a stage, or not
            return constrain(gradient, weight.axes, weight.path).astype(dtype), None

    copy.defvjp(lambda stored, used: (used, None), backward)
    return copy(weight.stored, used)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rotate(x_Sb: jax.Array, by: int) -> jax.Array:
    """Every stage's part handed on by so many stages: one collective-permute; so is its gradient, which JAX itself makes two."""
    return jnp.roll(x_Sb, by, axis=0)


def _rotate_forward(x_Sb: jax.Array, by: int) -> tuple[jax.Array, None]:
    return _rotate(x_Sb, by), None


def _rotate_backward(by: int, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (_rotate(gradient, -by),)


_rotate.defvjp(_rotate_forward, _rotate_backward)


def _spread(x: jax.Array, schedule: PipelineSchedule) -> jax.Array:
    """[B, ...] -> [S, K, b, ...]: strided, so that rows stay on the devices they are on."""
    S, K = schedule.stages, schedule.lanes
    return x.reshape(S, x.shape[0] // (S * K), K, *x.shape[1:]).swapaxes(1, 2)


def _by_microbatch(x: jax.Array, schedule: PipelineSchedule) -> jax.Array:
    """[B, ...] -> [M, b, ...], the same at every stage."""
    spread = _spread(x, schedule)
    microbatches = spread.reshape(-1, *spread.shape[2:])
    layout = current_layout()
    with use_layout(layout and replace(layout, inside_stage=True)):
        return constrain(microbatches, (None, "batch", *[None] * (x.ndim - 1)))


def _gather_rows(buffer: jax.Array, schedule: PipelineSchedule) -> jax.Array:
    """The inverse of `_spread`, of the buffer as it stands at the end."""
    counts = [schedule.final_turns(lane) % schedule.stages for lane in range(schedule.lanes)]
    edges = [0, *(lane for lane in range(1, schedule.lanes) if counts[lane] != counts[lane - 1]), schedule.lanes]
    parts = [_rotate(buffer[:, start:stop], counts[start]) for start, stop in itertools.pairwise(edges)]
    home = jnp.concatenate(parts, axis=1).swapaxes(1, 2)
    return home.reshape(-1, *home.shape[3:])


def _by_layer(products: jax.Array, schedule: PipelineSchedule) -> jax.Array:
    """[N, S, P, ...] -> [R x S x P, ...], summed over microbatches; what bubbles made is not read."""
    R, M = schedule.repeats, schedule.microbatches
    own = [products[schedule.hop * s : schedule.hop * s + R * M, s].reshape(R, M, *products.shape[2:]) for s in range(schedule.stages)]
    summed = jnp.sum(jnp.stack(own, axis=2), axis=1)  # [R, S, P, ...]
    return summed.reshape(-1, *summed.shape[3:])


def _select(active_S: jax.Array, x_Sb: jax.Array, otherwise: float) -> jax.Array:
    return _where_stage(active_S, x_Sb, jnp.asarray(otherwise, x_Sb.dtype))


def _where_stage(chosen_S: Any, x_Sb: jax.Array, other: jax.Array) -> jax.Array:
    """`x` at the chosen stages, `other` (an array like x, or a scalar) at the rest."""
    chosen = jnp.expand_dims(jnp.asarray(chosen_S), range(1, x_Sb.ndim))
    return jnp.where(chosen, x_Sb, other)
