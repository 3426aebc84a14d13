"""Grouped products by the megablox kernels (Pallas, TPU): rows stream through the chip's fast memory, each tile times its group's matrix.

M rows, G groups, D and F dims of a matrix.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from trainer.config.mlp import KERNEL_LANES

LARGEST_SIDE: Final = {"bfloat16": 1024, "float32": 512}
"""Of a tile of a matrix: two of each operand, and sums in float32, fit the 16 MiB the compiler gives a kernel."""
TILE_ROWS: Final = (128, 256, 512)
MOST_ROWS_OF_A_TILE: Final = 1024
MOST_TILES: Final = 1024
"""The library counts the visits to each tile of rows with a histogram in float32, which miscounts from some thousand tiles on
(seen at 5,000): the products are wrong then, without a word."""


class Tiles(NamedTuple):
    rows: int
    depth: int  # of D
    width: int  # of F

    @property
    def turned(self) -> Tiles:
        """Of the product with the transposed matrices."""
        return Tiles(self.rows, self.width, self.depth)


def tiles_of(rows: int, matrices: jax.ShapeDtypeStruct | jax.Array) -> Tiles | None:
    """Tiles that the kernels can take for so many rows times matrices [G, D, F]; None where they can take none.

    They divide D and F: the library computes what is left over of D otherwise, and has been seen to get it wrong
    (maxtext issue 1183). So both are multiples of 128, the lanes of a TPU. Rows are filled up with zeros to whole tiles.
    """
    groups, *sides = matrices.shape
    largest = LARGEST_SIDE.get(matrices.dtype.name)
    if largest is None or not rows or any(side % KERNEL_LANES for side in sides):
        return None
    # A group's first and last tile are shared with its neighbours: small ones where groups are small.
    best = max((size for size in TILE_ROWS if size <= rows // groups), default=TILE_ROWS[0])
    fitting = [size for size in (*TILE_ROWS, MOST_ROWS_OF_A_TILE) if size >= best and -(-rows // size) <= MOST_TILES]
    if not fitting:
        return None
    largest = largest if fitting[0] < MOST_ROWS_OF_A_TILE else largest // 2
    depth, width = (next(size for size in range(largest, 0, -KERNEL_LANES) if side % size == 0) for side in sides)
    return Tiles(fitting[0], depth, width)


def grouped_kernel(
    rows_MD: jax.Array, matrices_GDF: jax.Array, sizes_G: jax.Array, *, tiles: Tiles, transposed: bool = False, interpret: bool
) -> jax.Array:
    """Row m of group g times matrix g, [M, F], in the rows' dtype; zeros for rows of no group, whatever they hold.

    tiles: as `tiles_of`. transposed: matrices are [G, F, D].
    """
    # The kernel is not run for no tile at all; what it makes of the row is not used.
    some_G = sizes_G.at[0].add(jnp.where(jnp.any(sizes_G > 0), 0, 1))
    out = gmm(_filled(rows_MD, tiles), matrices_GDF, some_G, rows_MD.dtype, tuple(tiles), transpose_rhs=transposed, interpret=interpret)[
        : rows_MD.shape[0]
    ]
    return jnp.where(_used(rows_MD, sizes_G), out, 0)  # the kernel leaves what was in memory


def grouped_outer_kernel(rows_MD: jax.Array, others_MF: jax.Array, sizes_G: jax.Array, *, tiles: Tiles, interpret: bool) -> jax.Array:
    """The sum over each group's rows of row d times other row f, [G, D, F], in the rows' dtype; of an empty group zeros."""
    rows, others = _filled(rows_MD, tiles), _filled(others_MF, tiles)
    return tgmm(rows.swapaxes(0, 1), others, sizes_G, rows_MD.dtype, tuple(tiles), interpret=interpret)


def _filled(rows_MD: jax.Array, tiles: Tiles) -> jax.Array:
    return jnp.pad(rows_MD, ((0, -rows_MD.shape[0] % tiles.rows), (0, 0)))


def _used(rows_MD: jax.Array, sizes_G: jax.Array) -> jax.Array:
    return (jnp.arange(rows_MD.shape[0]) < jnp.sum(sizes_G))[:, None]
