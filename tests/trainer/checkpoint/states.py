"""Small training states whose every value follows from the step: any wrong bit shows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

REPEATS = 3
AXES = {"table": ("tensor", "fsdp"), "query": ("fsdp", "tensor")}  # of the last dims, by the last word of the path
SHAPES = {"embed/table": (16, 8), "segments/0/0/attention/query": (REPEATS, 8, 16), "segments/0/1/norm/scale": (REPEATS, 24)}


def mesh(fsdp: int, tensor: int = 1) -> Mesh:
    devices = np.array(jax.devices()[: fsdp * tensor]).reshape(fsdp, tensor)
    return Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def values(step: int, *, unrolled: bool = False) -> dict[str, dict[str, np.ndarray]]:
    """Parameters (one in bfloat16), two moments, a counter and a threefry key, as host arrays."""
    rng = np.random.default_rng(step)
    tree = {path: rng.standard_normal(shape, np.float32) for path, shape in SHAPES.items()}
    tree["embed/table"] = tree["embed/table"].astype(jnp.bfloat16)
    if unrolled:
        tree = _unrolled(tree)
    moments = {
        f"0/{name}/{path}": value.astype(np.float32) ** power for path, value in tree.items() for name, power in (("mu", 3), ("nu", 2))
    }
    key = np.array([7, step], np.uint32)
    return {"params": tree, "opt": {**moments, "0/count": np.int32(step)}, "rest": {"optimizer/step": np.int32(step), "key": key}}


def abstract(on: Mesh, *, unrolled: bool = False) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    def leaf(path: str, value: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(value), value.dtype, sharding=NamedSharding(on, _spec(path, np.ndim(value))))

    return {item: {path: leaf(path, value) for path, value in tree.items()} for item, tree in values(0, unrolled=unrolled).items()}


def state(step: int, on: Mesh, *, unrolled: bool = False) -> dict[str, dict[str, jax.Array]]:
    wanted = abstract(on, unrolled=unrolled)

    def place(item: str, path: str, value: Any) -> jax.Array:
        leaf = wanted[item][path]
        assert leaf.sharding is not None
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: np.asarray(value)[index])

    return {
        item: {path: place(item, path, value) for path, value in tree.items()} for item, tree in values(step, unrolled=unrolled).items()
    }


def differences(found: dict[str, dict[str, jax.Array]], step: int, on: Mesh, *, unrolled: bool = False) -> list[str]:
    """Paths whose bits (of this process's shards), dtype or sharding differ from the state of `step` on mesh `on`."""
    wrong: list[str] = []
    wanted = abstract(on, unrolled=unrolled)
    for item, tree in values(step, unrolled=unrolled).items():
        for path, value in tree.items():
            array, expected = found[item][path], np.asarray(value)
            same = all(np.asarray(shard.data).tobytes() == expected[shard.index].tobytes() for shard in array.addressable_shards)
            if not same or array.dtype != expected.dtype or array.sharding != wanted[item][path].sharding:
                wrong.append(f"{item}:{path}")
        wrong += [f"{item}:{path} is new" for path in found[item].keys() - tree.keys()]
    return wrong


def _unrolled(tree: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path, value in tree.items():
        if path.startswith("segments/"):
            segment, position, *rest = path.split("/")[1:]
            found |= {f"segments/{segment}/{position}/{repeat}/{'/'.join(rest)}": value[repeat] for repeat in range(REPEATS)}
        else:
            found[path] = value
    return found


def _spec(path: str, ndim: int) -> PartitionSpec:
    axes = AXES.get(path.rpartition("/")[2], ())
    return PartitionSpec(*(None,) * (ndim - len(axes)), *axes)
