"""Tensors that one replica has read, passed on to the others over the network.

Replicas are indices of the mesh axes `data` and `diloco`: a tensor that neither splits lies on every one of them. The
first one puts its shards, the others zeros, into an array with a leading dim that counts replicas; its sum over that dim
is the tensor on all of them. What is summed are integers, the bits of the values, so that no bit changes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from trainer.config.mesh import REPLICA_AXES

_BITS: Final = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def shared_over(sharding: Sharding | None) -> tuple[str, ...]:
    """The mesh axes of replicas that all have the same of a tensor; none where each has its own, or there is one."""
    if not isinstance(sharding, NamedSharding):
        return ()
    split = {axis for entry in sharding.spec for axis in ((entry,) if isinstance(entry, str) else entry or ())}
    return tuple(axis for axis in REPLICA_AXES if sharding.mesh.shape.get(axis, 1) > 1 and axis not in split)


def on_first_replica(leaf: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> jax.ShapeDtypeStruct:
    """The same tensor, laid out over the devices of index 0 of `axes` alone, in their own memory."""
    sharding = leaf.sharding
    assert isinstance(sharding, NamedSharding)
    mesh = sharding.mesh
    first = np.asarray(mesh.devices)[tuple(slice(0, 1) if axis in axes else slice(None) for axis in mesh.axis_names)]
    return jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=NamedSharding(Mesh(first, mesh.axis_names, axis_types=mesh.axis_types), sharding.spec)
    )


def pass_on(value: jax.Array | None, leaf: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> jax.Array:
    """The tensor `leaf` from `value`, laid out as `on_first_replica` says; None in a process without a device of that replica.

    A collective program: every process calls it for the same tensors in the same order.
    """
    sharding = leaf.sharding
    assert isinstance(sharding, NamedSharding)
    replicas = math.prod(sharding.mesh.shape[axis] for axis in axes)
    stacked = NamedSharding(sharding.mesh, PartitionSpec(axes, *sharding.spec))
    read = {} if value is None else {shard.device: shard.data for shard in value.addressable_shards}
    block = (1, *sharding.shard_shape(leaf.shape))
    pieces = [
        read[device].reshape(block) if device in read else jnp.zeros(block, leaf.dtype, device=device)
        for device in stacked.addressable_devices
    ]
    whole = jax.make_array_from_single_device_arrays((replicas, *leaf.shape), stacked, pieces)
    found = _sum(NamedSharding(sharding.mesh, sharding.spec))(whole)
    return found if sharding.memory_kind == found.sharding.memory_kind else jax.device_put(found, sharding)


@functools.cache
def _sum(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    def program(stacked: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(stacked, _BITS[stacked.dtype.itemsize])
        return jax.lax.bitcast_convert_type(jnp.sum(bits, axis=0, dtype=bits.dtype), stacked.dtype)

    return jax.jit(program, out_shardings=sharding)
