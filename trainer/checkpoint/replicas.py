"""The replicas of a checkpoint (DiLoCo), restored onto as many as the run has: replica r is the saved one r modulo their number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from trainer.checkpoint.arrays import AbstractItem, Meeting, describe, read
from trainer.checkpoint.layout import Leaf, Same

ITEM: Final = "replicas"


def replica_problems(saved: Mapping[str, Leaf], wanted: AbstractItem) -> Iterator[str]:
    """What does not fit, one sentence each: a tensor of every replica has to be there with the shape and dtype it has now."""
    described = describe(wanted)
    if not saved:
        yield "not saved: the checkpoint is of a run without replicas"
        return
    for path, leaf in described.items():
        if path not in saved:
            yield f"{path}: wanted {leaf}, not saved (layers of replicas are restored in the form they were saved in)"
        elif (saved[path].shape[1:], saved[path].dtype) != (leaf.shape[1:], leaf.dtype):
            yield f"{path}: saved {saved[path]}, wanted {leaf}"
    yield from (f"{path}: saved {leaf}, not wanted" for path, leaf in saved.items() if path not in described)


def read_replicas(folder: str, saved: Mapping[str, Leaf], wanted: AbstractItem, meeting: Meeting | None = None) -> dict[str, jax.Array]:
    """Tensors [R, ...] from saved ones [S, ...], each in its sharding; where R is not S, one tensor at a time. Meeting: as of `read`."""
    same = {path: leaf for path, leaf in wanted.items() if saved[path].shape == leaf.shape}
    found = read(folder, tuple(Same(path) for path in same), same, meeting)
    for path, leaf in wanted.items():
        if path not in same:
            assert isinstance(leaf.sharding, NamedSharding)
            everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec(None, *leaf.sharding.spec[1:]))
            whole = jax.ShapeDtypeStruct(saved[path].shape, leaf.dtype, sharding=everywhere)
            source = np.arange(leaf.shape[0]) % saved[path].shape[0]
            pick = jax.jit(lambda values, source=source: values[source], out_shardings=leaf.sharding)
            found[path] = pick(read(folder, (Same(path),), {path: whole}, meeting)[path])
    return found
