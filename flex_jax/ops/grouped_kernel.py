"""Grouped matmul as one GPU kernel, written in Pallas for Triton.

On NVIDIA GPUs, XLA expands `lax.ragged_dot` to a dense product with all E groups: E times the work, and an array of
tokens x E x inputs.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# Sizes of a tile. Three tiles of each operand fit in 100 KB, the shared memory of any GPU since Ampere.
TILE_TOKENS, TILE_COLUMNS, TILE_INPUT_BYTES = 128, 128, 128
NUM_STAGES, NUM_WARPS = 3, 4
MIN_TILE_TOKENS = 16  # the smallest tile that a tensor core takes


def group_blocks(group_sizes: Array, size: int, count: int) -> tuple[Array, Array, Array]:
    """Cuts sorted tokens into `count` blocks of at most `size` tokens, each within one group; the last may be empty.

    Returns for each block its group, its first token, and the token after the group's last one: int32 [count] each.
    """
    counts = -(-group_sizes // size)
    cumulative, end = jnp.cumsum(counts), jnp.cumsum(group_sizes)
    block = jnp.arange(count)
    group = jnp.minimum(jnp.searchsorted(cumulative, block, "right", method="compare_all"), len(group_sizes) - 1)
    start = (end - group_sizes)[group] + (block - (cumulative - counts)[group]) * size
    return group, start, end[group]


def grouped_matmul_kernel(
    tokens: Array,
    matrices: Array,
    group_sizes: Array,
    first: Array | int = 0,
    transposed: bool = False,
    interpret: bool = False,
) -> Array:
    """Multiplies each group of tokens by its matrix [D, F], or by the transposed matrix, accumulating in float32.

    tokens are [N, D], or [N, F] if `transposed`, sorted by group. The first group's matrix is number `first` of
    matrices [M, D, F], and those of the other groups follow it. The result has the dtype of the tokens; tokens after
    the last group are not written. `interpret` runs the kernel step by step on any device.

    Tiles of the matrices are read in place, without a copy. Elements have 2 or 4 bytes. Below 4 GB offsets are 32-bit.
    """
    count, inputs = tokens.shape
    columns = matrices.shape[1 if transposed else 2]
    average = pl.cdiv(count, len(group_sizes))
    tile_tokens = min(TILE_TOKENS, max(MIN_TILE_TOKENS, pl.next_power_of_2(average)))
    tile_inputs = TILE_INPUT_BYTES // tokens.dtype.itemsize
    num_blocks = pl.cdiv(count, tile_tokens) + min(count, len(group_sizes))
    group, start, end = group_blocks(group_sizes, tile_tokens, num_blocks)
    return pl.pallas_call(
        partial(_compute_tile, tile=(tile_tokens, TILE_COLUMNS, tile_inputs), transposed=transposed),
        out_shape=jax.ShapeDtypeStruct((count, columns), tokens.dtype),
        # Columns change fastest: tiles that run at the same time share tokens.
        grid=(pl.cdiv(columns, TILE_COLUMNS), num_blocks),
        compiler_params=triton.CompilerParams(num_warps=NUM_WARPS, num_stages=NUM_STAGES),
        interpret=interpret,
    )(group + first, start, end, tokens, matrices)


# Pallas passes every operand as an argument.
def _compute_tile(matrix_ref, start_ref, end_ref, tokens_ref, matrices_ref, out_ref, *, tile, transposed):  # noqa: PLR0913
    tile_tokens, tile_columns, tile_inputs = tile
    inputs, columns = tokens_ref.shape[1], out_ref.shape[1]
    column_block, block = pl.program_id(0), pl.program_id(1)
    matrix, start, end = matrix_ref[block], start_ref[block], end_ref[block]

    @pl.when(start < end)
    def _():
        token = (start + jnp.arange(tile_tokens))[:, None]
        column = (column_block * tile_columns + jnp.arange(tile_columns))[None, :]

        def step(i, total):
            inner = i * tile_inputs + jnp.arange(tile_inputs)
            across, down = inner[None, :], inner[:, None]
            a = triton.load(tokens_ref.at[token, across], mask=(token < end) & (across < inputs), other=0.0)
            place = (column, down) if transposed else (down, column)
            b = triton.load(matrices_ref.at[matrix, *place], mask=(down < inputs) & (column < columns), other=0.0)
            return total + triton.dot(a, b)

        zero = jnp.zeros((tile_tokens, tile_columns), jnp.float32)
        total = lax.fori_loop(0, pl.cdiv(inputs, tile_inputs), step, zero)
        triton.store(out_ref.at[token, column], total.astype(out_ref.dtype), mask=(token < end) & (column < columns))
