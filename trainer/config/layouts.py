"""Where each weight and the batch lie on a mesh, by the run's rules; the law a mesh has to obey. No JAX here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from trainer.config.base import near_miss
from trainer.config.mesh import product, used
from trainer.config.model import Model
from trainer.config.optimizer import Dtype
from trainer.config.pipeline import plan_pipeline
from trainer.config.problem import Problem
from trainer.config.rules import RULES, UNRULED, Resolution, in_use, resolve, split_further
from trainer.config.sharding import Sharding
from trainer.config.train import TrainConfig
from trainer.config.weights import LAYER_AXIS, Weight, stacked_path, weights

WEIGHT_MESH_AXES: Final = ("fsdp", "fsdp_transpose", "context", "tensor", "tensor_sequence", "expert")
"""Mesh axes that split every large weight; over the others (`diloco`, `data`, `stage` outside of a pipeline) weights are whole."""

LOOKED_UP: Final = "embed/table"

SIZES: Final = {"embed": "width", "heads": "attention.heads", "mlp": "mlp.hidden", "expert": "mlp.experts"}
"""Logical axes whose dims a mesh axis must divide, and the field of the model (or of the block) that gives the size."""


def weight_layouts(config: TrainConfig, mesh: Mapping[str, int]) -> Iterator[tuple[Weight, Resolution]]:
    """How each weight is laid out over `mesh` (mesh axis -> degree)."""
    for weight in weights(config.model, plan_pipeline(config, mesh)):
        yield weight, resolve(weight.axes, weight.shape, mesh, config.sharding.table(weight.path))


def stored_layout(
    sharding: Sharding, axes: Sequence[str | None], shape: Sequence[int], weight: str | None, mesh: Mapping[str, int]
) -> Resolution:
    """How the state keeps a weight, or a tensor of the optimizer for one, between steps. `weight`: the weight's path."""
    found = resolve(axes, shape, mesh, sharding.table(weight))
    return split_further(found, axes, shape, mesh, "data") if sharding.optimizer == "over_data" else found


def working_dtype(model: Model, *, path: str, inputs: int, exact: bool) -> Dtype:
    """Of a weight as the layers compute with it: their dtype, but float32 for vectors, for what is `exact`, and for the table
    of embeddings, whose rows are cast when they are looked up (so that its gradient is summed in float32)."""
    return model.compute_dtype if inputs and not exact and path != LOOKED_UP else "float32"


def batch_shards(mesh: Mapping[str, int], sharding: Sharding | None = None) -> int:
    """Ways the batch is split over a mesh."""
    return math.prod(mesh.get(axis, 1) for axis in _axes_of("batch", sharding or Sharding()))


def length_shards(mesh: Mapping[str, int], sharding: Sharding | None = None) -> int:
    """Ways a sequence is split over a mesh inside of attention and the MLP."""
    return math.prod(mesh.get(axis, 1) for axis in _axes_of("length", sharding or Sharding()))


@dataclass(frozen=True)
class Unsharded:
    """Weights that some mesh axis for weights does not split."""

    elements: int
    of: int
    weights: tuple[tuple[str, int, tuple[str, ...]], ...]  # (path with repeats stacked, elements, mesh axes missing), largest first

    @property
    def share(self) -> float:
        return self.elements / self.of

    @property
    def largest(self) -> str:
        """The worst of them in words, empty where there is none."""
        return ", ".join(f"{path} ({elements / self.of:.1%}, not over {'+'.join(axes)})" for path, elements, axes in self.weights[:3])


def unsharded(config: TrainConfig, mesh: Mapping[str, int]) -> Unsharded:
    """How much of the parameters lies in weights that are not split over every mesh axis that is there to split weights."""
    wanted = in_use(WEIGHT_MESH_AXES, mesh)
    total, found = 0, dict[tuple[str, tuple[str, ...]], int]()
    for weight, layout in weight_layouts(config, mesh):
        elements = math.prod(weight.shape)
        total += elements
        split = {axis for axes in layout.spec for axis in axes}
        if missing := tuple(axis for axis in wanted if axis not in split):
            key = stacked_path(weight.path), missing
            found[key] = found.get(key, 0) + elements
    listed = sorted(((path, elements, axes) for (path, axes), elements in found.items()), key=lambda entry: (-entry[1], entry[0]))
    return Unsharded(sum(found.values()), total, tuple(listed))


def rules_are_known(config: TrainConfig) -> Iterator[Problem]:
    """A rule of the run names a logical axis there is; one that is attached to a weight, a weight with that axis."""
    declared = weights(config.model)
    known = sorted({name for name, _ in RULES} | {*UNRULED} | {axis for weight in declared for axis in weight.axes})
    for index, rule in enumerate(config.sharding.rules):
        path = f"sharding.rules.{index}"
        if rule.axis not in known:
            close = near_miss(rule.axis, known)
            hint = f"did you mean {close!r}?" if close else f"one of: {', '.join(known)}"
            yield Problem(path=f"{path}.axis", message=f"no tensor has a logical axis {rule.axis!r}", hint=hint, code="logical-axis",
                          value=rule.axis)  # fmt: skip
        if rule.weight is None:
            continue
        matched = [weight for weight in declared if rule.matches(weight.path)]
        if not matched:
            close = near_miss(rule.weight, [weight.path for weight in declared])
            hint = f"did you mean {close!r}?" if close else "`nnxlaunch explain FILE --sharding` lists the weights; `*` is any text"
            message = f"no weight of this model matches {rule.weight!r}"
            yield Problem(path=f"{path}.weight", message=message, hint=hint, code="weight-pattern", value=rule.weight)
        elif rule.axis in known and not any(rule.axis in weight.axes for weight in matched):
            axes = sorted({axis for weight in matched for axis in weight.axes} - {LAYER_AXIS})
            message = f"no weight that matches {rule.weight!r} has an axis {rule.axis!r}"
            yield Problem(path=f"{path}.axis", message=message, hint=f"they have: {', '.join(axes)}", code="logical-axis", value=rule.axis)


def mesh_axes_are_used(config: TrainConfig, mesh: Mapping[str, int]) -> Iterator[Problem]:
    """Every mesh axis splits something: otherwise all devices of it would do the same work."""
    split = {axis for name in ("batch", "length") for axis in _axes_of(name, config.sharding)}
    split |= {"diloco"} if config.diloco is not None else set()
    split |= {axis for _, layout in weight_layouts(config, mesh) for winner in layout.winners if winner for axis in winner[1]}
    for axis, degree in used(mesh).items():
        if axis not in split:
            link = "dcn" if getattr(config.mesh.dcn, axis) != 1 else "ici"
            message = f"{degree}, but nothing of this run is split over {axis}: its devices would all do the same work"
            hint = "give the devices to another axis, such as data or fsdp"
            yield Problem(path=f"mesh.{link}.{axis}", message=message, hint=hint, code="axis-unused", value=degree, limit=1)


def weights_are_split(config: TrainConfig, mesh: Mapping[str, int]) -> Iterator[Problem]:
    """No more of the parameters than the limit lies in weights that are not split as the mesh would have it."""
    found, limit = unsharded(config, mesh), config.sharding.unsharded_limit
    if found.share > limit:
        message = f"{found.share:.1%} of the parameters are not split over every mesh axis for weights: {found.largest}"
        least = math.ceil(1000 * found.share) / 1000
        hint = f"choose degrees that divide their dims, add `sharding.rules`, or accept it with sharding.unsharded_limit: {least}"
        path, share = "sharding.unsharded_limit", round(found.share, 4)
        yield Problem(path=path, message=message, hint=hint, code="unsharded", value=share, limit=limit)


def batch_divides(config: TrainConfig, mesh: Mapping[str, int]) -> Iterator[Problem]:
    """Every microbatch, and every evaluation batch, has the same number of sequences on every shard of the batch."""
    replicas = mesh.get("diloco", 1) if config.diloco is not None else 1
    shards, accumulation = replicas * batch_shards(mesh, config.sharding), config.batch.accumulation
    axes = product({"diloco": replicas} | {axis: mesh.get(axis, 1) for axis in _axes_of("batch", config.sharding)})
    batches = {"batch.global_batch": (config.batch.global_batch, accumulation)}
    if config.eval is not None and config.eval.global_batch is not None:
        batches["eval.global_batch"] = (config.eval.global_batch, 1)
    for path, (sequences, parts) in batches.items():
        unit = shards * parts
        if sequences % unit:
            needed = f"{shards} batch shards ({axes})" + (f" x {parts} accumulation" if parts > 1 else "")
            hint = f"{unit}" if sequences < unit else f"{sequences - sequences % unit} or {sequences - sequences % unit + unit}"
            message = f"{sequences} sequences cannot be divided evenly over {needed}: not a multiple of {unit}"
            yield Problem(path=path, message=message, hint=hint, code="batch-shards", value=sequences, limit=unit)
    length = config.batch.sequence_length
    ways = math.lcm(*(math.prod(mesh.get(axis, 1) for axis in _axes_of(name, config.sharding)) for name in ("length", "act_length")))
    if length % ways:
        message = f"{length} tokens cannot be divided by the {ways} ways a sequence is split"
        hint = f"{ways}" if length < ways else f"{length - length % ways} or {length - length % ways + ways}"
        yield Problem(path="batch.sequence_length", message=message, hint=hint, code="length-shards", value=length, limit=ways)


def model_divides(config: TrainConfig, mesh: Mapping[str, int]) -> Iterator[Problem]:
    """Dims that a mesh axis splits are multiples of its degree; otherwise the axis would do nothing but cost."""
    reported: set[tuple[str, str]] = set()
    for weight, layout in weight_layouts(config, mesh):
        for dim, axis, _ in layout.dropped:
            name = weight.axes[dim]
            if name not in SIZES:
                continue
            field = SIZES[name]
            if weight.path.startswith("segments/"):
                _, segment, position, *_ = weight.path.split("/")
                field = "mlp.shared_hidden" if "mlp/shared/" in weight.path and name == "mlp" else field
                field = f"segments.{segment}.pattern.{position}.{field}" if name != "embed" else field
            if (field, axis) not in reported:
                reported.add((field, axis))
                yield _uneven(f"model.{field}", weight.shape[dim], axis, mesh[axis])


def _axes_of(name: str, sharding: Sharding) -> Sequence[str]:
    """Mesh axes of the first rule for a logical axis, which is the one that wins where nothing conflicts."""
    return next((axes for logical, axes in sharding.table() if logical == name), ())


def _uneven(path: str, size: int, axis: str, degree: int) -> Problem:
    message, hint = f"{size} cannot be divided by {axis}={degree}", f"choose a degree of {axis} that divides {size}"
    return Problem(path=path, message=message, hint=hint, code="model-shards", value=size, limit=degree)
