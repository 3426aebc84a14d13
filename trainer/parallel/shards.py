"""Functions of what a device holds, for what the partitioner cannot split by itself: Pallas kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    return (entry,) if isinstance(entry, str) else entry or ()


def map_shards(function: Callable[..., jax.Array], arrays: Sequence[jax.Array | None], axes: Sequence[Axes], *, like: int) -> jax.Array:
    """`function` of the shards each device holds of `arrays`, which are laid out as their logical `axes` say.

    The result is laid out as array number `like` is. Nothing is exchanged.
    """
    layout = current_layout()
    if layout is None or layout.mesh.size == 1:
        return function(*arrays)
    specs = tuple(PartitionSpec() if array is None else layout.spec(names, array.shape) for array, names in zip(arrays, axes, strict=True))
    # Its checker has no rule for a Pallas call.
    return jax.shard_map(function, mesh=layout.mesh, in_specs=specs, out_specs=specs[like], check_vma=False)(*arrays)
