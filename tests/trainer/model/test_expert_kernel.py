"""The megablox kernels, interpreted, against sums by hand in float64: values and gradients; what the kernels are given."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata

from trainer.model.expert_kernel import MOST_TILES, Tiles, tiles_of
from trainer.model.grouped import grouped_product

ROWS, GROUPS, DEPTH, WIDTH = 300, 5, 128, 256
SIZES = ([150, 0, 29, 100, 0], [0, 0, 0, 0, 0])
"""Two stages: groups that end within a tile, empty ones, rows of no group; and no row at all."""


def by_hand(rows: np.ndarray, matrices: np.ndarray, pulled: np.ndarray, sizes: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The product, and what `pulled` gives for rows and for matrices."""
    groups = np.repeat(np.arange(GROUPS), sizes)
    value, by_rows, by_matrices = np.zeros((ROWS, WIDTH)), np.zeros((ROWS, DEPTH)), np.zeros(matrices.shape)
    for m, group in enumerate(groups):
        value[m] = rows[m] @ matrices[group]
        by_rows[m] = matrices[group] @ pulled[m]
        by_matrices[group] += np.outer(rows[m], pulled[m])
    return value, by_rows, by_matrices


@pytest.mark.parametrize("stages", [pytest.param(1, marks=pytest.mark.full), 2])
def test_values_and_gradients_are_those_by_hand_and_rows_of_no_group_may_hold_anything(stages: int) -> None:
    generator = np.random.default_rng(0)
    rows, matrices, pulled = (
        generator.normal(size=(stages, *shape)).astype(np.float32) for shape in ((ROWS, DEPTH), (GROUPS, DEPTH, WIDTH), (ROWS, WIDTH))
    )
    sizes = jnp.asarray(SIZES[:stages], jnp.int32)
    for stage in range(stages):
        rows[stage, sum(SIZES[stage]) :] = pulled[stage, sum(SIZES[stage]) :] = np.nan

    def value(rows: jax.Array, matrices: jax.Array) -> jax.Array:
        return jax.vmap(lambda *operands: grouped_product(*operands, "megablox"))(rows, matrices, sizes)

    def both(rows: jax.Array, matrices: jax.Array, pulled: jax.Array) -> Any:
        with jax.default_matmul_precision("highest"):
            found, pull = jax.vjp(value, rows, matrices)
        return found, *pull(pulled)

    found = jax.jit(both)(rows, matrices, pulled)
    program = str(jax.make_jaxpr(both)(rows, matrices, pulled))
    assert "pallas_call" in program and "ragged_dot" not in program
    for stage in range(stages):
        wanted = by_hand(rows[stage], matrices[stage], pulled[stage], SIZES[stage])
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours[stage], theirs, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(theirs).max())))


def test_what_the_kernels_cannot_take_is_left_to_xla() -> None:
    def takes(rows: int, depth: int, width: int, dtype: Any = jnp.bfloat16, groups: int = 8) -> Tiles | None:
        return tiles_of(rows, jax.ShapeDtypeStruct((groups, depth, width), dtype))

    assert takes(65_536, 2048, 768) == Tiles(512, 1024, 768)
    assert takes(65_536, 4096, 14_336) == Tiles(512, 1024, 1024)
    assert takes(65_536, 4096, 14_336, jnp.float32) == Tiles(512, 512, 512)
    assert takes(64, 7168, 2048) == Tiles(128, 1024, 1024)
    assert takes(2048, 256, 256) == Tiles(256, 256, 256)
    assert takes(MOST_TILES * 1024, 1024, 256) == Tiles(1024, 512, 256)
    assert takes(MOST_TILES * 1024 + 1, 256, 256) is None
    assert takes(65_536, 2880, 2880) is None
    assert takes(65_536, 2048, 192) is None
    assert takes(65_536, 2048, 768, jnp.float16) is None
    rows, matrices = jnp.ones((8, 192)), jnp.ones((2, 192, 128))
    assert "ragged_dot" in str(jax.make_jaxpr(lambda *operands: grouped_product(*operands, "megablox"))(rows, matrices, jnp.array([3, 4])))


def test_the_library_counts_right_as_many_tiles_as_it_is_given() -> None:
    """It miscounts some thousands. Each tile of rows is visited once here, by a group of its own."""
    sizes = jnp.full(MOST_TILES, 128, jnp.int32)
    counted = partial(make_group_metadata, m=MOST_TILES * 128, tm=128, start_group=jnp.int32(0), num_nonzero_groups=MOST_TILES)
    (_, groups, tiles), count = jax.jit(lambda sizes: counted(group_sizes=sizes))(sizes)
    assert count == MOST_TILES
    np.testing.assert_array_equal(tiles[:MOST_TILES], np.arange(MOST_TILES))
    np.testing.assert_array_equal(groups[:MOST_TILES], np.arange(MOST_TILES))
