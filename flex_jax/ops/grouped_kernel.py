"""Grouped matmul as one GPU kernel, in Triton by way of Pallas: what `lax.ragged_dot` is not on NVIDIA GPUs, where XLA
writes it out as a dense product with all E groups, for E times the work and an array of rows x E x inputs."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

ROWS, COLUMNS, INPUT_BYTES = 128, 128, 128  # of a tile; three of each operand fit the 100 KB of any GPU since Ampere
STAGES, WARPS = 3, 4
SMALLEST = 16  # rows of a tile, that a tensor core takes


def row_blocks(sizes: jax.Array, rows: int, blocks: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows sorted by group, cut into blocks of up to `rows` that lie in one group: of each block the group, its first
    row and the row after the group's last, [blocks] int32. sizes [E] int32. Blocks after the last one are empty."""
    counts = -(-sizes // rows)
    upto, end = jnp.cumsum(counts), jnp.cumsum(sizes)
    block = jnp.arange(blocks)
    group = jnp.minimum(jnp.searchsorted(upto, block, side="right", method="compare_all"), len(sizes) - 1)
    start = (end - sizes)[group] + (block - (upto - counts)[group]) * rows
    return group, start, end[group]


def grouped_matmul_kernel(
    rows: jax.Array,
    matrices: jax.Array,
    sizes: jax.Array,
    first: jax.Array | int = 0,
    transposed: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """rows [N, D] sorted by group, each group by its own of the matrices [M, D, F], which are those from `first` on;
    or rows [N, F] by their transposes. sizes [E] int32. Accumulates in float32, returns the dtype of `rows`; rows after
    the last group are not written.

    Tiles of the matrices are read in their place, so that neither a layer of a larger stack nor a transpose is copied.
    A number must have 2 or 4 bytes: up to 4 GB Pallas counts places in 32 bits.
    """
    count, inputs = rows.shape
    columns = matrices.shape[1 if transposed else 2]
    average = pl.cdiv(count, len(sizes))
    tile_rows = min(ROWS, max(SMALLEST, pl.next_power_of_2(average)))
    tile_inputs = INPUT_BYTES // rows.dtype.itemsize
    blocks = pl.cdiv(count, tile_rows) + min(count, len(sizes))
    group, start, end = row_blocks(sizes, tile_rows, blocks)
    return pl.pallas_call(
        partial(_compute_tile, tile=(tile_rows, COLUMNS, tile_inputs), transposed=transposed),
        out_shape=jax.ShapeDtypeStruct((count, columns), rows.dtype),
        # Columns change fastest: tiles that run at the same time have rows in common.
        grid=(pl.cdiv(columns, COLUMNS), blocks),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
    )(group + first, start, end, rows, matrices)


def _compute_tile(matrix_ref, start_ref, end_ref, rows_ref, matrices_ref, out_ref, *, tile, transposed):
    tile_rows, tile_columns, tile_inputs = tile
    inputs, columns = rows_ref.shape[1], out_ref.shape[1]
    own_columns, block = pl.program_id(0), pl.program_id(1)
    matrix, start, end = matrix_ref[block], start_ref[block], end_ref[block]

    @pl.when(start < end)
    def _():
        row = (start + jnp.arange(tile_rows))[:, None]
        column = (own_columns * tile_columns + jnp.arange(tile_columns))[None, :]

        def step(i, total):
            inner = i * tile_inputs + jnp.arange(tile_inputs)
            across, down = inner[None, :], inner[:, None]
            a = triton.load(rows_ref.at[row, across], mask=(row < end) & (across < inputs), other=0.0)
            place = (column, down) if transposed else (down, column)
            b = triton.load(matrices_ref.at[matrix, *place], mask=(down < inputs) & (column < columns), other=0.0)
            return total + triton.dot(a, b)

        total = lax.fori_loop(0, pl.cdiv(inputs, tile_inputs), step, jnp.zeros((tile_rows, tile_columns), jnp.float32))
        triton.store(out_ref.at[row, column], total.astype(out_ref.dtype), mask=(row < end) & (column < columns))
