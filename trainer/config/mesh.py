"""The device mesh: how many ways each axis is split inside a slice (ICI) and between slices (DCN)."""

from __future__ import annotations

from typing import Annotated, Final, Self

from pydantic import Field, model_validator

from trainer.config.base import Node

MESH_AXES: Final = ("data", "fsdp", "tensor")
"""Mesh axes in mesh order, outermost first."""

Degree = Annotated[int, Field(ge=-1, le=2**20, strict=True)]


class AxisDegrees(Node):
    """Degrees of the mesh axes on one kind of link; one may be -1: what is left."""

    data: Degree = 1
    fsdp: Degree = 1
    tensor: Degree = 1

    @model_validator(mode="after")
    def _one_open(self) -> Self:
        if [self.data, self.fsdp, self.tensor].count(-1) > 1:
            raise ValueError("only one degree may be -1")
        if 0 in (self.data, self.fsdp, self.tensor):
            raise ValueError("a degree is at least 1, or -1 for what is left")
        return self

    def solve(self, total: int, what: str) -> dict[str, int]:
        """Degrees whose product is `total`; `what` names it in the error. Raises ValueError with the arithmetic."""
        degrees = {axis: getattr(self, axis) for axis in MESH_AXES}
        fixed = 1
        for degree in degrees.values():
            fixed *= degree if degree > 0 else 1
        arithmetic = " x ".join(f"{axis}={degree}" for axis, degree in degrees.items() if degree != 1) or "1"
        if -1 in degrees.values():
            if total % fixed:
                raise ValueError(f"{arithmetic}: {total} {what} cannot be divided by {fixed}")
            return {axis: total // fixed if degree == -1 else degree for axis, degree in degrees.items()}
        if fixed != total:
            raise ValueError(f"{arithmetic} needs {fixed} {what}, there are {total}")
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
