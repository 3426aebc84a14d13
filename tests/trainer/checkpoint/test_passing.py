"""What one replica has read arrives on the others with every bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trainer.checkpoint.passing import on_first_replica, pass_on, shared_over

MESH = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("diloco", "data", "fsdp"), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize(("dtype", "bits"), [(jnp.float32, np.uint32), (jnp.bfloat16, np.uint16), (jnp.int32, np.uint32)])
@pytest.mark.parametrize("spec", [PartitionSpec("fsdp"), PartitionSpec("diloco", "fsdp"), PartitionSpec()], ids=str)
def test_negative_zeros_payloads_of_nan_and_denormals_stay_as_they_are(dtype: type, bits: type, spec: PartitionSpec) -> None:
    width = 8 * np.dtype(bits).itemsize
    random = np.random.default_rng(0).integers(0, 2**width, (4, 8), dtype=np.uint64).astype(bits)
    random[0, :4] = [1 << (width - 1), (1 << width) - 3, 1, 0x7F81 << (width - 16)]  # -0, a NaN, the least denormal, a signalling NaN
    leaf = jax.ShapeDtypeStruct((4, 8), dtype, sharding=NamedSharding(MESH, spec))
    axes = shared_over(leaf.sharding)
    assert axes == (("data",) if "diloco" in spec else ("diloco", "data"))
    first = on_first_replica(leaf, axes)
    assert len(first.sharding.device_set) == (4 if "diloco" in spec else 2)
    whole = random.view(dtype)
    found = pass_on(jax.make_array_from_callback((4, 8), first.sharding, lambda index: whole[index]), leaf, axes)
    assert found.sharding == leaf.sharding and len(found.addressable_shards) == 8
    for shard in found.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data).view(bits), random[shard.index])


def test_a_tensor_that_every_replica_has_a_part_of_is_not_shared() -> None:
    assert shared_over(NamedSharding(MESH, PartitionSpec(("diloco", "data"), "fsdp"))) == ()
    assert shared_over(None) == ()
