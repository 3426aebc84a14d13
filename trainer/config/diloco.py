"""DiLoCo: replicas train apart and meet every H steps (Douillard et al. 2023), by fragments if asked (2025). No JAX here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from trainer.config.base import Node, NonNegativeInt, PositiveFloat, PositiveInt
from trainer.config.model import Model
from trainer.config.problem import Problem
from trainer.config.weights import LAYER_AXIS, split_repeat, weights

if TYPE_CHECKING:
    from trainer.config.train import TrainConfig


class DiLoCo(Node):
    """Every index of the mesh axis `diloco` is a replica with parameters and optimizer of its own.

    A replica trains on its part of every batch. At a sync, the outer parameters take a step of SGD with Nesterov
    momentum along what the replicas moved on average, and the replicas go on from there; their optimizers keep their
    state. Checkpoints hold both; evaluation, export and decoding use the outer parameters.
    """

    sync_every_steps: PositiveInt
    """Steps between two syncs of the same parameters (H)."""
    outer_learning_rate: PositiveFloat = 0.7
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    fragments: PositiveInt = 1
    """Parts the parameters are synced in, one after the other at equal distances: Streaming DiLoCo. With more than one, the first
    holds what is outside of the layers, the others hold layers."""
    layers: Literal["strided", "sequential"] = "strided"
    """Layers of a fragment: every n-th one, or neighbours."""
    delay_steps: NonNegativeInt = 0
    """Steps between a fragment's sync and the moment the replicas take its result."""
    blend: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of its own value that a replica keeps when it takes a result."""


@dataclass(frozen=True)
class Part:
    """What a fragment has of one tensor: all of it, or some of its layers (indices of the leading dim)."""

    path: str
    layers: tuple[int, ...] | None = None


def fragment_parts(model: Model, config: DiLoCo) -> tuple[tuple[Part, ...], ...]:
    """The weights of each fragment, in forward order; every element of every weight is in exactly one."""
    groups = config.fragments - 1
    total = sum(segment.repeats * len(segment.pattern) for segment in model.segments)
    found: list[list[Part]] = [[] for _ in range(config.fragments)]
    first = [sum(segment.repeats * len(segment.pattern) for segment in model.segments[:s]) for s in range(len(model.segments))]

    def fragment(layer: int) -> int:
        return 1 + (layer % groups if config.layers == "strided" else layer * groups // total)

    for weight in weights(model):
        if not groups or not weight.path.startswith("segments/"):
            found[0].append(Part(weight.path))
            continue
        stacked, repeat = split_repeat(weight.path)
        s, p = (int(part) for part in stacked.split("/")[1:3])
        length = len(model.segments[s].pattern)
        if weight.axes[0] != LAYER_AXIS:
            found[fragment(first[s] + (repeat or 0) * length + p)].append(Part(weight.path))
            continue
        rows: dict[int, list[int]] = {}
        for r in range(model.segments[s].repeats):
            rows.setdefault(fragment(first[s] + r * length + p), []).append(r)
        for number, layers in rows.items():
            found[number].append(Part(weight.path, tuple(layers)))
    return tuple(tuple(parts) for parts in found)


@dataclass(frozen=True)
class Turns:
    """Which fragment is synced, and which is taken, after a number of finished steps: by that number modulo H; None is none."""

    sends: tuple[int | None, ...]
    takes: tuple[int | None, ...]


def turns(config: DiLoCo) -> Turns:
    """Fragment f is synced after every (f + 1) H / F steps of H, and taken `delay_steps` later."""
    H, F = config.sync_every_steps, config.fragments
    sends: list[int | None] = [None] * H
    takes: list[int | None] = [None] * H
    for f in range(F):
        at = (f + 1) * H // F
        sends[at % H] = f
        takes[(at + config.delay_steps) % H] = f
    return Turns(tuple(sends), tuple(takes))


def diloco_fits(config: TrainConfig, mesh: Mapping[str, int]) -> Iterator[Problem]:
    """Replicas and their syncs fit the mesh and the run."""
    diloco, replicas = config.diloco, mesh.get("diloco", 1)
    if diloco is None:
        if replicas > 1:
            link = "dcn" if config.mesh.dcn.diloco != 1 else "ici"
            message = f"{replicas} replicas, but the run does not say when they meet"
            yield Problem(path=f"mesh.{link}.diloco", message=message, hint="add `diloco: {sync_every_steps: 30}`, or use the axis data",
                          code="diloco", value=replicas, limit=1)  # fmt: skip
        return
    every, fragments = diloco.sync_every_steps, diloco.fragments
    if config.steps % every:
        hint = f"{config.steps - config.steps % every} or {config.steps - config.steps % every + every}"
        message = f"{config.steps} is not a multiple of diloco.sync_every_steps ({every}): the last steps would not reach the parameters"
        yield Problem(path="steps", message=message, hint=hint, code="diloco", value=config.steps, limit=every)
    if every % fragments:
        message = f"{fragments} fragments cannot be synced at equal distances within {every} steps"
        yield Problem(path="diloco.fragments", message=message, hint=f"a divisor of {every}", code="diloco", value=fragments, limit=every)
    if diloco.delay_steps >= every:
        message = f"{diloco.delay_steps} is not below sync_every_steps ({every}): the fragment would be synced again before it is taken"
        yield Problem(path="diloco.delay_steps", message=message, hint="a few steps are usual", code="diloco", limit=every - 1)
    layers = sum(segment.repeats * len(segment.pattern) for segment in config.model.segments)
    if fragments > layers + 1:
        message = f"{fragments}, but the model has {layers} layers"
        yield Problem(path="diloco.fragments", message=message, hint=f"at most {layers + 1}", code="diloco", limit=layers + 1)
    if fragments > 1 and config.pipeline is not None:
        message = f"{fragments}, but the layers of a pipeline are stored by stage"
        yield Problem(path="diloco.fragments", message=message, hint="1, or no pipeline", code="diloco", value=fragments, limit=1)
    if fragments == 1 and diloco.delay_steps == 0 and diloco.blend:
        message = f"{diloco.blend}: replicas that take the whole result at once would never be equal to it"
        yield Problem(path="diloco.blend", message=message, hint="0, or use fragments or a delay", code="diloco", value=diloco.blend)
