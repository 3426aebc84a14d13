"""Rotary position embedding (Su et al. 2021) and the ways its frequencies are scaled.

B sequences, T tokens, N heads, H head dim, R rotated dims of it (R/2 pairs).
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp

from trainer.config.model import LinearScaling, Llama3Scaling, Rope, YarnScaling

Table = tuple[jax.Array, jax.Array]
"""Cosine and sine, float32 [B, T, R/2]."""


def rope_frequencies(spec: Rope, rotated: int) -> list[float]:
    """Radians per position of each of the `rotated` / 2 pairs, scaled where asked for."""
    frequencies = [spec.theta ** (-2 * i / rotated) for i in range(rotated // 2)]
    match spec.scaling:
        case None:
            return frequencies
        case LinearScaling(factor=factor):
            return [frequency / factor for frequency in frequencies]
        case Llama3Scaling() as scaling:
            return [_llama3(frequency, scaling) for frequency in frequencies]
        case YarnScaling() as scaling:
            return _yarn(frequencies, spec.theta, rotated, scaling)


def rope_table(positions_BT: jax.Array, spec: Rope, rotated: int) -> Table:
    """Cosine and sine of position times frequency, times YaRN's gain."""
    frequencies = jnp.asarray(rope_frequencies(spec, rotated), jnp.float32)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies[None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if isinstance(spec.scaling, YarnScaling) and (gain := spec.scaling.rotated_gain) != 1:
        return cos * gain, sin * gain
    return cos, sin


def rotate(x_BTNH: jax.Array, table: Table, pairs: Literal["halves", "interleaved"] = "halves") -> jax.Array:
    """The leading dims of each head that `table` has angles for, rotated in float32; the others as they are, in float32.

    Interleaved pairs come out as two halves: queries and keys alike, so products do not see the order.
    """
    x_BTNH = x_BTNH.astype(jnp.float32)
    rotated = 2 * table[0].shape[-1]
    if rotated != x_BTNH.shape[-1]:
        return jnp.concatenate([rotate(x_BTNH[..., :rotated], table, pairs), x_BTNH[..., rotated:]], axis=-1)
    cos, sin = (half[:, :, None, :] for half in table)
    first, second = jnp.split(x_BTNH, 2, axis=-1) if pairs == "halves" else (x_BTNH[..., 0::2], x_BTNH[..., 1::2])
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _llama3(frequency: float, scaling: Llama3Scaling) -> float:
    """Frequencies whose wavelength exceeds original_length / low_freq_factor are divided by `factor`, those below
    original_length / high_freq_factor are kept, linear in original_length / wavelength between the two
    (Llama 3.1 reference code, `apply_scaling`).
    """
    turns = scaling.original_length * frequency / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = min(max(kept, 0.0), 1.0)
    return frequency * (kept + (1 - kept) / scaling.factor)


def _yarn(frequencies: list[float], theta: float, rotated: int, scaling: YarnScaling) -> list[float]:
    """Pair i keeps its frequency below the ramp, has it divided by `factor` above (Peng et al. 2023, section 3.2).

    The ramp is linear in i, from the pair that turns beta_fast times over the original length to the one that turns
    beta_slow times. Its ends are bounded by 0 and `rotated` - 1, as in the YaRN reference code.
    """

    def pair_that_turns(times: float) -> float:
        return rotated * math.log(scaling.original_length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    width = high - low if high != low else 0.001
    divided = [min(max((i - low) / width, 0.0), 1.0) for i in range(len(frequencies))]
    return [frequency * (1 - part + part / scaling.factor) for frequency, part in zip(frequencies, divided, strict=True)]
