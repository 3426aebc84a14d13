"""What one host has of a delta, as bytes: the distinct shards on its devices, described by a JSON header.

The hosts of two slices with one mesh have the same shards, so that a host reads of every slice only what its own host number wrote.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from trainer.errors import WorldError

LENGTH: Final = struct.Struct("<Q")
Region = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Path of a tensor, and where one of its shards starts and stops."""
Shards = dict[Region, np.ndarray]


def host_shards(arrays: Mapping[str, jax.Array]) -> Shards:
    """The distinct shards of this process, by path and place; waits for the devices."""
    found: Shards = {}
    for path in sorted(arrays):
        array = arrays[path]
        for shard in array.addressable_shards:
            region = _region(path, shard.index, array.shape)
            if region not in found:
                found[region] = np.asarray(shard.data)
    return found


def encode(shards: Shards) -> bytes:
    regions = [[path, start, stop, array.dtype.name] for (path, start, stop), array in shards.items()]
    header = json.dumps(regions).encode()
    return b"".join([LENGTH.pack(len(header)), header, *(np.ascontiguousarray(array).tobytes() for array in shards.values())])


def decode(data: bytes) -> Shards:
    (length,) = LENGTH.unpack_from(data)
    offset, found = LENGTH.size + length, Shards()
    for path, start, stop, dtype in json.loads(data[LENGTH.size : offset]):
        shape = tuple(b - a for a, b in zip(start, stop, strict=True))
        array = np.frombuffer(data, jnp.dtype(dtype), int(np.prod(shape)), offset).reshape(shape)
        found[path, tuple(start), tuple(stop)] = array
        offset += array.nbytes
    return found


def mean(parts: Sequence[bytes]) -> Shards:
    """The mean of several encoded deltas in float32, summed in their order. Raises WorldError where they do not have the same shards."""
    total: Shards = {}
    for data in parts:
        shards = decode(data)
        if total and shards.keys() != total.keys():
            unlike = sorted({region[0] for region in total.keys() ^ shards.keys()})
            raise WorldError(
                f"slices do not have the same shards of {', '.join(unlike[:3])}: they are of different models or meshes",
                hint="every slice must run the same job spec",
            )
        for region, array in shards.items():
            total[region] = array.astype(np.float32) if region not in total else total[region] + array.astype(np.float32)
    return {region: array / np.float32(len(parts)) for region, array in total.items()}


def place(shards: Shards, shardings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    """Arrays by path out of the shards of this process. Raises WorldError where one is missing: another model or mesh."""

    def pick(path: str, index: tuple[slice, ...] | None) -> np.ndarray:
        region = _region(path, index or (), shapes[path])
        if region not in shards:
            raise WorldError(f"the shards of {path} are not those of this mesh", hint="every slice must run the same job spec")
        return shards[region]

    return {
        path: jax.make_array_from_callback(shapes[path], sharding, lambda index, path=path: pick(path, index))
        for path, sharding in shardings.items()
    }


def _region(path: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> Region:
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    return path, tuple(start for start, _ in bounds), tuple(stop for _, stop in bounds)
