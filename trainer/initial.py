"""The first parameters of a run: the same bits for every mesh, stage count, layer form and process count.

A weight's key is a hash of the seed, its logical path and its repeat. Normal values are read from a table of
quantiles by random bits: integer arithmetic and one multiplication are exact, while the usual inverse error
function is a polynomial whose last bit changes with the vectorisation of each shard's shape.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import cache
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np

from trainer.config.model import Model
from trainer.config.pipeline import PipelinePlan
from trainer.config.weights import Constant, Normal, Weight, stacked_path, weights


def initial_keys(model: Model, seed: int, pipeline: PipelinePlan | None = None) -> dict[str, np.ndarray]:
    """Threefry key data of every weight by path, uint32 [layer dims..., 2]: a hash of seed, logical path and repeat."""
    return {weight.path: _keys(weight, seed) for weight in weights(model, pipeline)}


def initial_parameters(model: Model, keys: Mapping[str, jax.Array], pipeline: PipelinePlan | None = None) -> dict[str, jax.Array]:
    """Every parameter by path, float32, in the layer form of `model` and `pipeline`; `keys` are those of `initial_keys`."""
    return {weight.path: _initial(weight, keys[weight.path]) for weight in weights(model, pipeline)}


def random_key(seed: int) -> jax.Array:
    """The run's typed threefry key."""
    return jax.random.key(seed, impl="threefry2x32")


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal values, float32, each one of 65,536 equally likely quantiles (largest 4.3); bitwise reproducible."""
    bits = jax.random.bits(key, shape, jnp.uint16).astype(jnp.int32)
    magnitude = jnp.asarray(_upper_quantiles())[bits >> 1]
    return jnp.where(bits & 1, magnitude, -magnitude)


@cache
def _upper_quantiles() -> np.ndarray:
    """The 32,768 positive values among the midpoint quantiles (i + 1/2) / 65,536 of the normal distribution, float32."""
    inverse = NormalDist().inv_cdf
    return np.array([inverse(0.5 + (i + 0.5) / 65536) for i in range(32768)], np.float32)


def _keys(weight: Weight, seed: int) -> np.ndarray:
    path, stacked = stacked_path(weight.path), weight.shape[: weight.layer_dims]

    def one(repeat: int) -> list[int]:
        digest = hashlib.sha256(f"{seed}/{path}/{repeat}".encode()).digest()
        return [int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")]

    repeats = range(weight.first_repeat, weight.first_repeat + math.prod(stacked))
    return np.array([one(repeat) for repeat in repeats], np.uint32).reshape(*stacked, 2)


def _initial(weight: Weight, keys: jax.Array) -> jax.Array:
    def one(key_data: jax.Array) -> jax.Array:
        match weight.init:
            case Normal(stddev):
                return stddev * normal(jax.random.wrap_key_data(key_data, impl="threefry2x32"), weight.layer_shape)
            case Constant(value):
                return jnp.full(weight.layer_shape, value, jnp.float32)

    for _ in range(weight.layer_dims):
        one = jax.vmap(one)
    return one(keys)
