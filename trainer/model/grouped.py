"""The product of rows that are grouped, each with the matrix of its group.

M rows, G groups, D and F dims of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from trainer.config.mlp import ExpertKernel
from trainer.model.expert_kernel import Tiles, grouped_kernel, grouped_outer_kernel, tiles_of
from trainer.parallel.shards import on_tpu


class _Form(NamedTuple):
    """How the product and its gradients are computed."""

    precision: str | None
    tiles: Tiles | None  # of the kernel; None: `jax.lax.ragged_dot`
    interpret: bool


def grouped_product(rows_MD: jax.Array, matrices_GDF: jax.Array, sizes_G: jax.Array, kernel: ExpertKernel = "auto") -> jax.Array:
    """Row m of group g times matrix g: [M, F]. Rows are sorted by group, `sizes` int32 of each; the rest gives zeros or garbage.

    By the megablox kernels on TPUs (`auto`), or anywhere (`megablox`; interpreted where there is no TPU), and by
    `jax.lax.ragged_dot` elsewhere, where it is asked for, and where the kernels cannot be used: where D or F of a device is not a
    multiple of 128, operands are not both float32 or both bfloat16, or there are more than a million rows.

    Neither sees a batch dim under `jax.vmap`: the TPU compiler takes none, and a device has one stage of a pipeline only.
    """
    asked = kernel == "megablox" or (kernel == "auto" and on_tpu())
    tiles = tiles_of(rows_MD.shape[0], matrices_GDF) if asked and rows_MD.dtype == matrices_GDF.dtype else None
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if tiles is not None and rows_MD.dtype == jnp.bfloat16:
        precision = None  # in a kernel the compiler takes no other: products of bfloat16 are exact, sums are float32
    return _product(_Form(precision, tiles, interpret=not on_tpu()), rows_MD, matrices_GDF, sizes_G)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(form: _Form, rows_MD: jax.Array, matrices_GDF: jax.Array, sizes_G: jax.Array) -> jax.Array:
    def times(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
        if form.tiles is None:
            return jax.lax.ragged_dot(rows, matrices, sizes, precision=form.precision)
        with jax.default_matmul_precision(form.precision):
            return grouped_kernel(rows, matrices, sizes, tiles=form.tiles, interpret=form.interpret)

    return _one_at_a_time(times)(rows_MD, matrices_GDF, sizes_G)


def _forward(form: _Form, *operands: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _product(form, *operands), operands


def _backward(form: _Form, operands: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    def pull(rows: jax.Array, matrices: jax.Array, sizes: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        if (tiles := form.tiles) is None:
            product = partial(jax.lax.ragged_dot, group_sizes=sizes, precision=form.precision)
            return jax.vjp(lambda rows, matrices: product(rows, matrices), rows, matrices)[1](gradient)
        with jax.default_matmul_precision(form.precision):
            return (
                grouped_kernel(gradient, matrices, sizes, tiles=tiles.turned, transposed=True, interpret=form.interpret),
                grouped_outer_kernel(rows, gradient, sizes, tiles=tiles, interpret=form.interpret),
            )

    return (*_one_at_a_time(pull)(*operands, gradient), None)


_product.defvjp(_forward, _backward)


def _one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which under `jax.vmap` is called for one member of the batch after the other."""
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def by_member(axis_size: int, in_batched: list[bool], *arguments: jax.Array) -> tuple[Any, Any]:  # pyright: ignore[reportUnusedFunction]
        def one(members: list[jax.Array]) -> Any:
            left = iter(members)
            return function(*(next(left) if batched else whole for whole, batched in zip(arguments, in_batched, strict=True)))

        members = [argument for argument, batched in zip(arguments, in_batched, strict=True) if batched]
        if axis_size == 1:
            result = jax.tree.map(lambda leaf: leaf[None], one([member[0] for member in members]))
        else:
            result = jax.lax.map(one, members)
        return result, jax.tree.map(lambda _: True, result)

    return mapped
