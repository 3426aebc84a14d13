"""The first parameters of a run: the same bits for every mesh, stage count, layer form and process count.

A weight's key is folded from the seed, its logical path and its repeat. Normal values are read from a table of
quantiles by random bits: integer arithmetic and one multiplication are exact, while the usual inverse error
function is a polynomial whose last bit changes with the vectorisation of each shard's shape.
"""

from __future__ import annotations

import zlib
from functools import cache
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np

from trainer.config.model import Model
from trainer.config.weights import Constant, Normal, Weight, split_repeat, weights


def initial_parameters(model: Model, seed: int) -> dict[str, jax.Array]:
    """Every parameter by path, float32, in the layer form of `model`."""
    key = random_key(seed)
    return {weight.path: _initial(weight, key) for weight in weights(model)}


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


def _initial(weight: Weight, seed: jax.Array) -> jax.Array:
    path, repeat = split_repeat(weight.path)
    key = jax.random.fold_in(seed, zlib.crc32(path.encode()))

    def one(repeat: jax.typing.ArrayLike) -> jax.Array:
        match weight.init:
            case Normal(stddev):
                return stddev * normal(jax.random.fold_in(key, repeat), weight.layer_shape)
            case Constant(value):
                return jnp.full(weight.layer_shape, value, jnp.float32)

    if weight.layer_dims:
        return jax.vmap(one)(jnp.arange(weight.shape[0]))
    return one(repeat or 0)
