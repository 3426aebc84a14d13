"""Attention, rotary embedding and norm against plain float64 arithmetic."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.model import Llama3Scaling, Rope
from trainer.model.attend import attend, attention_mask
from trainer.model.rope import rope_frequencies, rope_table, rotate


def naive_attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    positions: np.ndarray,
    segments: np.ndarray,
    window: int | None,
    cap: float | None,
) -> np.ndarray:
    """One query at a time, float64."""
    B, T, N, _ = query.shape
    group = N // key.shape[2]
    mixed = np.zeros_like(query)
    for b in range(B):
        for t in range(T):
            distance = positions[b, t] - positions[b]
            seen = (segments[b] == segments[b, t]) & (distance >= 0) & (distance < (window or T + 1))
            for n in range(N):
                scores = key[b, seen, n // group] @ query[b, t, n]
                scores = cap * np.tanh(scores / cap) if cap else scores
                weights = np.exp(scores - scores.max())
                mixed[b, t, n] = weights @ value[b, seen, n // group] / weights.sum()
    return mixed


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments [B, T]: documents one after another, padding at the end."""
    B, T = 2, draw(st.sampled_from([1, 11]))
    positions, segments = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for row in range(B):
        end = draw(st.integers(0, T))
        starts = sorted(draw(st.sets(st.integers(1, max(end - 1, 1)), max_size=3)) | {0})
        for number, (start, stop) in enumerate(zip(starts, [*starts[1:], end], strict=True), 1):
            segments[row, start:stop] = number
            positions[row, start:stop] = np.arange(max(stop - start, 0))
    return positions, segments


@jax.jit
def compiled_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    window: int | None,
    cap: float | None,
) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return attend(query, key, value, attention_mask((positions, segments), (positions, segments), window), soft_cap=cap)


@settings(max_examples=60, deadline=None)
@given(
    rows=packed_rows(),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 3)]),
    window=st.none() | st.integers(1, 14),
    cap=st.none() | st.floats(0.5, 50),
    seed=st.integers(0, 2**31),
)
def test_attention_equals_the_naive_sum(
    rows: tuple[np.ndarray, np.ndarray], heads: tuple[int, int], window: int | None, cap: float | None, seed: int
) -> None:
    positions, segments = rows
    random = np.random.default_rng(seed)
    query, key, value = (2 * random.normal(size=(*positions.shape, n, 6)) for n in (heads[0], heads[1], heads[1]))
    arrays = (jnp.asarray(x, jnp.float32) for x in (query, key, value))
    ours = compiled_attention(*arrays, positions, segments, window, cap)
    np.testing.assert_allclose(ours, naive_attention(query, key, value, positions, segments, window, cap), atol=2e-5)


def test_rotated_products_depend_on_the_distance_only() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
    starts = np.arange(0, 500, 7)

    @jax.jit
    def rotated(vector: jax.Array, positions: jax.Array) -> jax.Array:
        rows = jnp.broadcast_to(vector, (1, len(positions), 1, 8))
        return rotate(rows, rope_table(positions[None], Rope(theta=1e4), 8))

    products = np.asarray(rotated(x, starts + 4) * rotated(y, starts)).sum(axis=-1)
    np.testing.assert_allclose(products, products[0, 0, 0], atol=1e-4)


def test_llama3_scaling_keeps_high_frequencies_divides_low_ones_and_blends_between() -> None:
    scaling = Llama3Scaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_length=8192)
    plain = np.array(rope_frequencies(Rope(theta=5e5), 128))
    scaled = np.array(rope_frequencies(Rope(theta=5e5, scaling=scaling), 128))
    wavelength = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-12)
    between = (wavelength >= 8192 / 4) & (wavelength <= 8192)
    smooth = (8192 / wavelength[between] - 1) / (4 - 1)  # the reference code's formula
    np.testing.assert_allclose(scaled[between], (1 - smooth) * plain[between] / 8 + smooth * plain[between], rtol=1e-12)
