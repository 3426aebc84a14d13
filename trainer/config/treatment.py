"""What an optimizer does to each weight, and every tensor it keeps for it, declared once. No JAX here.

The optimizer builds its state from this list; sharding, `explain` and byte arithmetic read the same list.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, Literal, assert_never

from trainer.config.base import near_miss
from trainer.config.optimizer import Adafactor, AdamW, Dtype, Group, Lion, Muon, Optimizer, Sgd
from trainer.config.problem import Problem
from trainer.config.train import TrainConfig
from trainer.config.weights import Weight, stacked_path, weights

Method = Literal["adamw", "muon", "sgd", "adafactor", "lion"]
AXIS: Final = "axis:"
DTYPE_BYTES: Final[dict[Dtype, int]] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Moment:
    """A tensor an optimizer keeps for a weight; its path in the optimizer's state is `slot/PATH OF THE WEIGHT`."""

    slot: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    """Logical axis of each dim."""
    dtype: Dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Treatment:
    """What happens to one weight."""

    weight: Weight
    method: Method
    frozen: bool
    weight_decay: float
    learning_rate_factor: float
    moments: tuple[Moment, ...]


@dataclass(frozen=True)
class Dims:
    """The dims of a weight as a set of matrices."""

    batch: tuple[int, ...]
    """Stacked layers and experts: each has a matrix of its own."""
    inputs: tuple[int, ...]
    """Contracted by the forward matmul; empty for vectors (norms, biases)."""
    outputs: tuple[int, ...]


def matrix_dims(weight: Weight) -> Dims:
    """Which dims of `weight` are matrix dims, from what its declaration says of the matmul."""
    first = weight.layer_dims + weight.batch
    dims = tuple(range(len(weight.shape)))
    return Dims(dims[:first], dims[first : first + weight.inputs], dims[first + weight.inputs :])


def factored_dims(weight: Weight, smallest: int) -> tuple[int, int] | None:
    """The second largest and the largest dim of one layer's (one expert's) tensor, as Adafactor factors it; None where it does not."""
    dims = matrix_dims(weight)
    by_size = sorted((*dims.inputs, *dims.outputs), key=lambda dim: weight.shape[dim])
    if len(by_size) < 2 or weight.shape[by_size[-2]] < smallest:
        return None
    return by_size[-2], by_size[-1]


def treatments(optimizer: Optimizer, weights: Iterable[Weight]) -> tuple[Treatment, ...]:
    """One for each of `weights`, in order."""
    return tuple(_treatment(optimizer, weight) for weight in weights)


def trained(treated: Iterable[Treatment]) -> tuple[Treatment, ...]:
    """Those that are not frozen."""
    return tuple(treatment for treatment in treated if not treatment.frozen)


def selects(selector: str, weight: Weight) -> bool:
    if selector.startswith(AXIS):
        return selector.removeprefix(AXIS) in weight.axes
    return fnmatchcase(stacked_path(weight.path), selector)


def groups_select(config: TrainConfig) -> Iterator[Problem]:
    """Every selector of a group selects a tensor, and something is left to train."""
    declared = weights(config.model)
    for g, group in enumerate(config.optimizer.groups):
        for s, selector in enumerate(group.tensors):
            if not any(selects(selector, weight) for weight in declared):
                yield _nothing(f"optimizer.groups.{g}.tensors.{s}", selector, declared)
    if not trained(treatments(config.optimizer, declared)):
        message = "every tensor is frozen: there is nothing to train"
        yield Problem(path="optimizer.groups", message=message, hint="freeze fewer tensors", code="frozen", value=len(declared))


def _nothing(path: str, selector: str, declared: Iterable[Weight]) -> Problem:
    names = {f"{AXIS}{axis}" for weight in declared for axis in weight.axes} | {stacked_path(weight.path) for weight in declared}
    kind = sorted(name for name in names if name.startswith(AXIS) == selector.startswith(AXIS))
    close = near_miss(selector, kind)
    hint = f"did you mean {close!r}?" if close else f"one of: {', '.join(kind)}"
    return Problem(path=path, message=f"{selector!r} selects no tensor of the model", hint=hint, code="selects-nothing", value=selector)


def _treatment(optimizer: Optimizer, weight: Weight) -> Treatment:
    group = next((group for group in optimizer.groups if any(selects(s, weight) for s in group.tensors)), None)
    if not weight.trained or (group is not None and group.frozen):
        return Treatment(weight, optimizer.type, True, 0.0, 1.0, ())
    method = _method(optimizer, weight)
    moments = tuple(_moments(optimizer, method, weight))
    return Treatment(weight, method, False, _decay(optimizer, group, weight), group.learning_rate_factor if group else 1.0, moments)


def _decay(optimizer: Optimizer, group: Group | None, weight: Weight) -> float:
    if group is not None and group.weight_decay is not None:
        return group.weight_decay
    return optimizer.weight_decay if optimizer.decay == "all" or weight.inputs else 0.0


def _method(optimizer: Optimizer, weight: Weight) -> Method:
    """Muon is for matrices between hidden vectors: not for vectors, and not where a dim is the vocabulary."""
    if isinstance(optimizer, Muon) and not (weight.inputs and "vocab" not in weight.axes):
        return "adamw"
    return optimizer.type


def _moments(optimizer: Optimizer, method: Method, weight: Weight) -> Iterator[Moment]:
    match optimizer:
        case AdamW() | Muon():
            yield _whole("mu", weight, optimizer.moment_dtype)
            if method == "adamw":
                yield _whole("nu", weight, "float32")
        case Sgd():
            if optimizer.momentum:
                yield _whole("mu", weight, optimizer.moment_dtype)
        case Lion():
            yield _whole("mu", weight, optimizer.moment_dtype)
        case Adafactor():
            factored = factored_dims(weight, optimizer.factored_from)
            if factored is None:
                yield _whole("nu", weight, "float32")
            else:
                yield _without("row", weight, factored[1])
                yield _without("column", weight, factored[0])
        case _:
            assert_never(optimizer)


def _whole(slot: str, weight: Weight, dtype: Dtype) -> Moment:
    return Moment(slot, weight.shape, weight.axes, dtype)


def _without(slot: str, weight: Weight, dim: int) -> Moment:
    return Moment(slot, weight.shape[:dim] + weight.shape[dim + 1 :], weight.axes[:dim] + weight.axes[dim + 1 :], "float32")
