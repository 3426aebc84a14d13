"""The device mesh: ICI axes inside a slice, DCN axes between slices, no slice split by an ICI axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from trainer.config.mesh import MESH_AXES
from trainer.config.mesh import Mesh as MeshConfig
from trainer.config.problem import ConfigError, Problem

if TYPE_CHECKING:
    from jaxlib._jax import Device  # the public name is a variable to a type checker


def build_mesh(config: MeshConfig, devices: Sequence[Device], *, slices: int) -> Mesh:
    """Mesh with axes MESH_AXES over `devices`.

    A device belongs to the slice that its runtime says, or, where it says nothing (CPU), to the one its
    process number falls into. Raises ConfigError with the arithmetic when the degrees do not fit.
    """
    groups = _by_slice(devices, slices)
    per_slice = len(groups[0])
    try:
        ici = config.ici.solve(per_slice, "devices per slice")
        dcn = config.dcn.solve(slices, "slices")
    except ValueError as error:
        raise ConfigError([_problem(str(error), "use -1 for the axis that takes what is left")]) from None
    ici_shape = tuple(ici[axis] for axis in MESH_AXES)
    dcn_shape = tuple(dcn[axis] for axis in MESH_AXES)
    grid = np.empty(dcn_shape + ici_shape, dtype=object)
    for index, group in zip(np.ndindex(dcn_shape), groups, strict=True):
        grid[index] = _arrange(group, ici_shape)
    # [dcn..., ici...] -> (dcn, ici) pairs per axis, DCN outermost.
    rank = len(MESH_AXES)
    grid = grid.transpose([dim for axis in range(rank) for dim in (axis, rank + axis)])
    grid = grid.reshape([dcn[axis] * ici[axis] for axis in MESH_AXES])
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * rank)


def _by_slice(devices: Sequence[Device], slices: int) -> list[list[Device]]:
    ordered = sorted(devices, key=lambda device: device.id)
    if ordered[0].platform == "tpu" and slices > 1:
        indices = sorted({device.slice_index for device in ordered})
        groups = [[device for device in ordered if device.slice_index == index] for index in indices]
    else:
        ordered.sort(key=lambda device: (device.process_index, device.id))
        if len(ordered) % slices:
            raise ConfigError([_problem(f"{len(ordered)} devices cannot be split over {slices} slices")])
        size = len(ordered) // slices
        groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    if len(groups) != slices or len({len(group) for group in groups}) != 1:
        sizes = ", ".join(str(len(group)) for group in groups)
        raise ConfigError([_problem(f"expected {slices} slices of equal size, found slices of {sizes} devices")])
    return groups


def _arrange(devices: list[Device], shape: tuple[int, ...]) -> np.ndarray:
    if devices[0].platform == "tpu":
        return mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    grid = np.empty(len(devices), dtype=object)
    grid[:] = devices
    return grid.reshape(shape)


def _problem(message: str, hint: str = "") -> Problem:
    return Problem(path="mesh", message=message, hint=hint, code="mesh")
