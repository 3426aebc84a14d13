"""Functions of what a device holds, for what the partitioner does not split well by itself: Pallas kernels, loops over one weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from trainer.parallel.sharding import current_layout

Axes = Sequence[str | None]


def on_tpu() -> bool:
    """Whether the program that is being traced is for TPUs, as the layout says."""
    layout = current_layout()
    return layout is not None and layout.mesh.devices.flat[0].platform == "tpu"


def mesh_axes_of(axes: Axes, shape: Sequence[int], dim: int) -> tuple[str, ...]:
    """Mesh axes that split dim `dim` of an array with these logical axes."""
    layout = current_layout()
    if layout is None:
        return ()
    spec = layout.spec(axes, shape)
    entry = spec[dim] if dim < len(spec) else None  # a spec leaves out what follows its last split dim
    return _names(entry)


def spec_of_dim(axes: Axes, shape: Sequence[int], dim: int) -> PartitionSpec:
    """Of an array that has nothing but this dim: split as in the whole one, whose other dims may have taken what a rule names."""
    return PartitionSpec(mesh_axes_of(axes, shape, dim) or None)


def map_shards(
    function: Callable[..., jax.Array],
    arrays: Sequence[jax.Array | None],
    axes: Sequence[Axes | PartitionSpec],
    *,
    like: int,
    more: tuple[Any, Any] | None = None,
) -> jax.Array:
    """`function` of the shards each device holds of `arrays`, which are laid out as their logical `axes`, or a PartitionSpec, say.

    The result is laid out as array number `like` is. What is exchanged, the function exchanges. more: a tree that the function
    takes last, and a tree of PartitionSpecs for it; only on a mesh of several devices.
    """
    layout = current_layout()
    if layout is None or layout.mesh.size == 1:
        return function(*arrays)
    specs = tuple(
        names if isinstance(names, PartitionSpec) else PartitionSpec() if array is None else layout.spec(names, array.shape)
        for array, names in zip(arrays, axes, strict=True)
    )
    trees, tree_specs = ((), ()) if more is None else ((more[0],), (more[1],))
    # Its checker has no rule for a Pallas call.
    mapped = jax.shard_map(function, mesh=layout.mesh, in_specs=(*specs, *tree_specs), out_specs=specs[like], check_vma=False)
    return mapped(*arrays, *trees)


def sum_over_batch_shards(
    function: Callable[..., Any], weight: jax.Array, weight_axes: Axes, path: str, rows: Sequence[jax.Array], row_axes: Axes
) -> Any:
    """The sum of `function(weight, *rows)`, a tree of scalars, over the parts of the batch that devices hold.

    rows: arrays [B, T, ...]; row_axes: logical axes of their first two dims. The weight, whose `path` rules may be attached
    to, is gathered once over the mesh axes that split the batch, and its gradient is summed and scattered once, whatever
    the function does with it. Mesh axes that do not split the batch are left to the partitioner.
    """
    layout = current_layout()
    if layout is None or layout.mesh.size == 1:
        return function(weight, *rows)
    spec = layout.spec(row_axes, rows[0].shape[:2])
    manual = {axis for entry in spec for axis in _names(entry)}
    if not manual:
        return function(weight, *rows)
    split = [tuple(axis for axis in _names(entry) if axis in manual) for entry in layout.spec(weight_axes, weight.shape, path)]

    def inside(weight: jax.Array, *rows: jax.Array) -> Any:
        for dim, axes in enumerate(split):
            weight = jax.lax.all_gather(weight, axes, axis=dim, tiled=True) if axes else weight
        return jax.lax.psum(function(weight, *rows), tuple(manual))

    specs = (PartitionSpec(*(axes or None for axes in split)), *(spec for _ in rows))
    # A step of replicas is mapped over their axis: what that splits has to be manual here too.
    names = manual | {axis for axis in ("diloco",) if layout.mesh.shape.get(axis, 1) > 1}
    mapped = jax.shard_map(inside, mesh=layout.mesh, in_specs=specs, out_specs=PartitionSpec(), axis_names=names, check_vma=False)
    return mapped(weight, *rows)


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()
