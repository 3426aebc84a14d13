"""The device mesh: how many ways each axis is split inside a slice (ICI) and between slices (DCN)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Final, Self

from pydantic import Field, model_validator

from trainer.config.base import Node

MESH_AXES: Final = ("diloco", "data", "stage", "fsdp", "fsdp_transpose", "context", "tensor", "tensor_sequence", "expert")
"""Mesh axes in mesh order, outermost first: neighbours on the last ones are nearest on the torus."""

REPLICA_AXES: Final = ("diloco", "data")
"""Those whose indices may all have the same of a tensor, and lie on slices of their own."""

Degree = Annotated[int, Field(ge=-1, le=2**20, strict=True)]


class AxisDegrees(Node):
    """Degrees of the mesh axes on one kind of link; one may be -1: what is left."""

    diloco: Degree = 1
    """Replicas that train apart and average now and then."""
    data: Degree = 1
    """Splits the batch; weights are whole on every device of it."""
    stage: Degree = 1
    """Pipeline stages; where nothing is pipelined it splits the batch as `data` does."""
    fsdp: Degree = 1
    """Splits the batch and the width of every weight."""
    fsdp_transpose: Degree = 1
    """As `fsdp`, but on the other dim of the MLP's weights."""
    context: Degree = 1
    """Splits the length of a sequence, and weights as `fsdp` does."""
    tensor: Degree = 1
    """Splits heads, the MLP's hidden dim and the vocabulary."""
    tensor_sequence: Degree = 1
    """As `tensor`; between blocks it splits the length, so that norms and residuals are not computed twice."""
    expert: Degree = 1
    """Splits the experts of a mixture; outside of them the batch, and weights as `fsdp` does."""

    @model_validator(mode="after")
    def _one_open(self) -> Self:
        degrees = list(self.by_axis().values())
        if degrees.count(-1) > 1:
            raise ValueError("only one degree may be -1")
        if 0 in degrees:
            raise ValueError("a degree is at least 1, or -1 for what is left")
        return self

    def by_axis(self) -> dict[str, int]:
        """The degree of each mesh axis as given, in mesh order."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    def solve(self, total: int, what: str) -> dict[str, int]:
        """Degrees whose product is `total`; `what` names it in the error. Raises ValueError with the arithmetic."""
        degrees = self.by_axis()
        fixed = {axis: degree for axis, degree in degrees.items() if degree > 1}
        product = math.prod(fixed.values())
        if -1 in degrees.values():
            if total % product:
                raise ValueError(f"{_arithmetic(fixed, what, 'a multiple of ')}, has {total}: {_nearest(fixed, total, open_axis=True)}")
            return {axis: total // product if degree == -1 else degree for axis, degree in degrees.items()}
        if product != total:
            raise ValueError(f"{_arithmetic(fixed, what)}, has {total}: {_nearest(fixed, total, open_axis=False)}")
        return degrees


class Mesh(Node):
    ici: AxisDegrees = AxisDegrees(fsdp=-1)
    """Inside a slice; the product is the number of devices of a slice."""
    dcn: AxisDegrees = AxisDegrees(data=-1)
    """Between slices; the product is the number of slices."""

    def shape(self, *, slices: int, devices_per_slice: int) -> dict[str, int]:
        """Degree of each mesh axis over the whole job. Raises ValueError where the arithmetic does not fit."""
        ici = self.ici.solve(devices_per_slice, "devices per slice")
        dcn = self.dcn.solve(slices, "slices")
        return {axis: ici[axis] * dcn[axis] for axis in MESH_AXES}


def used(mesh: Mapping[str, int]) -> dict[str, int]:
    """The axes of a mesh that split anything: those of more than one degree."""
    return {axis: degree for axis, degree in mesh.items() if degree != 1}


def product(degrees: Mapping[str, int]) -> str:
    """`data=2 x fsdp=64`, without the axes of size 1."""
    return " x ".join(f"{axis}={degree}" for axis, degree in used(degrees).items()) or "1"


def _arithmetic(fixed: Mapping[str, int], what: str, unit: str = "") -> str:
    return f"{product(fixed)} needs {unit}{' x '.join(map(str, fixed.values())) or 1} {what}"


def _nearest(fixed: Mapping[str, int], total: int, *, open_axis: bool) -> str:
    """The change of one degree that makes the product fit: the smallest such change, as a ratio."""
    found: list[tuple[float, str]] = []
    for axis, degree in fixed.items():
        rest = math.prod(fixed.values()) // degree
        if total % rest:
            continue
        left = total // rest
        fitting = [divisor for divisor in _divisors(left) if divisor > 1] if open_axis else [left]
        found += [(abs(math.log(candidate / degree)), f"{axis}={candidate}") for candidate in fitting]
    return f"{min(found)[1]} divides" if found else "no change of one degree divides"


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})
