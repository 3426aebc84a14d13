"""The product of rows that are grouped, each with the matrix of its group.

M rows, G groups, D and F dims of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.custom_batching import custom_vmap


def grouped_product(rows_MD: jax.Array, matrices_GDF: jax.Array, sizes_G: jax.Array) -> jax.Array:
    """Row m of group g times matrix g: [M, F]. Rows are sorted by group, `sizes` int32 of each; the rest gives zeros or garbage.

    `jax.lax.ragged_dot`, and its gradient, without a batch dim under `jax.vmap` too: the TPU compiler takes none, and a device
    has one stage of a pipeline only.
    """
    return _product(jax.config.jax_default_matmul_precision, rows_MD, matrices_GDF, sizes_G)  # pyright: ignore[reportAttributeAccessIssue]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(precision: str | None, rows_MD: jax.Array, matrices_GDF: jax.Array, sizes_G: jax.Array) -> jax.Array:
    return _one_at_a_time(partial(jax.lax.ragged_dot, precision=precision))(rows_MD, matrices_GDF, sizes_G)


def _forward(precision: str | None, *operands: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _product(precision, *operands), operands


def _backward(precision: str | None, operands: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    def pull(rows: jax.Array, matrices: jax.Array, sizes: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        product = partial(jax.lax.ragged_dot, group_sizes=sizes, precision=precision)
        return jax.vjp(lambda rows, matrices: product(rows, matrices), rows, matrices)[1](gradient)

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
