"""DiLoCo: replicas train apart and meet every H steps (Douillard et al. 2023), by fragments if asked (2025). No JAX here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from trainer.config.base import Node, NonNegativeInt, PositiveFloat, PositiveInt
from trainer.config.mesh import AxisDegrees, product
from trainer.config.model import Model
from trainer.config.problem import Problem
from trainer.config.weights import LAYER_AXIS, split_repeat, weights

if TYPE_CHECKING:
    from trainer.config.train import TrainConfig


class MeshTransport(Node):
    """Replicas are indices of the mesh axis `diloco` of one JAX world: what they exchange goes from device to device."""

    type: Literal["mesh"] = "mesh"


class FilesTransport(Node):
    """Every slice is a JAX world of its own and a replica; they meet through files in the run directory, local or gs://.

    A slice that is lost is left out of the next sync, the others go on, and it joins again when it is back.
    """

    type: Literal["files"] = "files"
    wait_seconds: PositiveInt = 60
    """How long a slice that has come to a sync waits for the others, before it goes on with those that are there. One that was
    not there is not waited for again until it is back."""
    delta_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which a slice says how far its parameters have moved."""


def _named(value: Any) -> Any:
    """`transport: files` means `transport: {type: files}`."""
    return {"type": value} if isinstance(value, str) else value


Transport = Annotated[MeshTransport | FilesTransport, Field(discriminator="type")]


class DiLoCo(Node):
    """Replicas with parameters and optimizer of their own: indices of the mesh axis `diloco`, or slices (`transport: files`).

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
    transport: Annotated[Transport, BeforeValidator(_named)] = MeshTransport()
    """What replicas are, and how they exchange what they have moved."""

    @property
    def files(self) -> FilesTransport | None:
        """The transport where every slice is a JAX world of its own."""
        return self.transport if isinstance(self.transport, FilesTransport) else None


def worlds_apart(config: TrainConfig) -> bool:
    """Whether every slice is a JAX world of its own."""
    return config.diloco is not None and config.diloco.files is not None


def one_world(config: TrainConfig, slices: int) -> TrainConfig:
    """What one of `slices` worlds trains: `config` with its share of the batch, and nothing between slices."""
    ramp = config.batch.ramp_up
    share = {"global_batch": config.batch.global_batch // slices}
    grows = {name: getattr(ramp, name) // slices for name in ("start", "increment")} if ramp else {}
    batch = config.batch.model_copy(update={**share, "ramp_up": ramp and ramp.model_copy(update=grows)})
    mesh = config.mesh.model_copy(update={"dcn": AxisDegrees()})
    return config.model_copy(update={"batch": batch, "mesh": mesh})


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


def worlds_fit(config: TrainConfig, slices: int) -> Iterator[Problem]:
    """Slices that are worlds of their own have equal shares of the batch, and exchange all parameters at once."""
    assert config.diloco is not None
    for link in ("dcn", "ici"):
        degrees = getattr(config.mesh, link).by_axis()
        split = {axis: degree for axis, degree in degrees.items() if degree > 1 and (link == "dcn" or axis == "diloco")}
        if split:
            message = f"{product(split)}, but with `diloco.transport: files` every slice is a world and a replica of its own"
            hint = f"leave mesh.{link} out" if link == "dcn" else "mesh.ici.diloco: 1"
            yield Problem(path=f"mesh.{link}", message=message, hint=hint, code="diloco", value=product(split), limit=1)
    size, accumulation = config.batch.global_batch, config.batch.accumulation
    if size % (slices * accumulation):
        message = f"{size} sequences cannot be split over {slices} slices" + (f" x {accumulation} microbatches" if accumulation > 1 else "")
        hint = f"a multiple of {slices * accumulation}"
        yield Problem(path="batch.global_batch", message=message, hint=hint, code="diloco", value=size, limit=slices * accumulation)
    ramp = config.batch.ramp_up
    for name, value in (("start", ramp.start), ("increment", ramp.increment)) if ramp else ():
        if value % slices:
            message, hint = f"{value} sequences cannot be split over {slices} slices", f"a multiple of {slices}"
            yield Problem(path=f"batch.ramp_up.{name}", message=message, hint=hint, code="diloco", value=value, limit=slices)
    settings = config.diloco
    for name, value, plain in (("fragments", settings.fragments, 1), ("delay_steps", settings.delay_steps, 0)):
        if value != plain:
            message = f"{value}, but slices that meet through files exchange all parameters at once and take the result before they go on"
            hint = f"{plain}, or `transport: mesh`"
            yield Problem(path=f"diloco.{name}", message=message, hint=hint, code="diloco", value=value, limit=plain)


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
