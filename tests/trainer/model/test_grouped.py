"""The grouped product of experts under `jax.vmap`, as a pipeline's stages take it: value, gradients, and no further dim."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.model.grouped import grouped_product

ROWS, GROUPS, DEPTH, WIDTH = 12, 4, 5, 3


def arguments(stages: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows, matrices and sizes for every stage; a group of each has no row, and some rows belong to none."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(stages, ROWS, DEPTH)).astype(np.float32)
    matrices = generator.normal(size=(stages, GROUPS, DEPTH, WIDTH)).astype(np.float32)
    sizes = np.stack([generator.permutation([0, 1, 3, 6]) for _ in range(stages)]).astype(np.int32)
    return jnp.asarray(rows), jnp.asarray(matrices), jnp.asarray(sizes)


def by_hand(rows: np.ndarray, matrices: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    groups = np.repeat(np.arange(GROUPS), sizes)
    return np.stack([row @ matrices[group] for row, group in zip(rows.astype(np.float64), groups, strict=False)])


@pytest.mark.parametrize("stages", [1, 3])
def test_mapped_over_stages_each_has_its_own_product_and_gradients(stages: int) -> None:
    rows, matrices, sizes = arguments(stages)
    used = int(sizes[0].sum())
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(stages, used, WIDTH)).astype(np.float32))

    def value(rows: jax.Array, matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = jax.vmap(grouped_product)(rows, matrices, sizes)[:, :used]
        return jnp.sum(found * weight), found

    (by_rows, by_matrices), found = jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))(rows, matrices)
    for stage in range(stages):
        own = [np.asarray(array[stage]) for array in (rows, matrices, sizes, weight)]
        np.testing.assert_allclose(found[stage], by_hand(*own[:3]), rtol=1e-5, atol=1e-5)
        wanted = np.zeros((GROUPS, DEPTH, WIDTH))
        groups = np.repeat(np.arange(GROUPS), own[2])
        for row, group, pulled in zip(own[0], groups, own[3], strict=False):
            wanted[group] += np.outer(row, pulled)
        np.testing.assert_allclose(by_matrices[stage], wanted, rtol=1e-5, atol=1e-5)
        wanted_rows = np.stack([own[1][group] @ pulled for group, pulled in zip(groups, own[3], strict=True)])
        np.testing.assert_allclose(by_rows[stage][:used], wanted_rows, rtol=1e-5, atol=1e-5)


def test_one_stage_a_device_leaves_no_dim_that_tpu_compilers_do_not_take() -> None:
    rows, matrices, sizes = arguments(1)

    def value(rows: jax.Array, matrices: jax.Array) -> jax.Array:
        return jnp.sum(jax.vmap(grouped_product)(rows, matrices, sizes))

    program = str(jax.make_jaxpr(jax.grad(value, argnums=(0, 1)))(rows, matrices))
    batch_dims = re.findall(r"dot_dimension_numbers=\(\(.*?\), \((\(.*?\)), (\(.*?\))\)\)", program)
    assert len(batch_dims) == program.count("ragged_dot_general[") >= 3
    assert set(batch_dims) == {("()", "()")}
