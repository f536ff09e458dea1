"""Rows in consecutive groups, each group computed with matrices of its own."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from flex_jax.ops.quantised import Quantised, dequantise

BLOCK_ROWS = 256  # rows of a CPU step: a half-empty block of each group is wasted, smaller ones multiply more slowly

Matmul = Callable[..., jax.Array]  # (rows, matrices, transposed=False) -> rows


def map_groups(
    function: Callable, rows: tuple[jax.Array, ...], weights: tuple[jax.Array | Quantised, ...], sizes: jax.Array
) -> tuple[jax.Array, ...]:
    """function(matmul, *rows, *weights), each group of rows with its own matrices.

    rows: arrays [N, ...] sorted by group; weights: stacks of matrices [E, D, F]; sizes [E] int32, of a sum of at most
    N: what comes of the rows after that is finite and of no meaning. The function is one of single rows, made of
    elementwise operations and of `matmul(rows, weights, transposed=False)`; it returns arrays [N, ...]. Products are
    accumulated in float32.

    On accelerators it runs once, with `grouped_matmul`. On CPU, where that is a masked dense product over all E groups,
    it runs on one block of rows after another, all of its matmuls while the block is in the cache.
    """
    if jax.default_backend() == "cpu":
        return _map_blocks(function, rows, weights, sizes)
    return function(partial(grouped_matmul, sizes=sizes), *rows, *weights)


def grouped_matmul(rows: jax.Array, weights: jax.Array | Quantised, transposed: bool = False, *, sizes: jax.Array):
    """`lax.ragged_dot`: rows [N, D], or [N, F] where `transposed`, by stacked matrices [E, D, F] or their transposes.

    Quantised weights are dequantised first, one layer's at a time. Returns the dtype of `rows`; zero for rows after the
    last group.
    """
    weights = dequantise(weights, rows.dtype)
    if transposed:
        weights = jnp.swapaxes(weights, 1, 2)
    product = lax.ragged_dot(rows, weights, sizes, preferred_element_type=jnp.float32)
    grouped = jnp.arange(len(rows)) < sizes.sum()  # kernels differ in what they leave in the other rows
    return jnp.where(grouped[:, None], product, 0.0).astype(rows.dtype)


def plain_matmul(rows: jax.Array, matrix: jax.Array | Quantised, transposed: bool = False) -> jax.Array:
    """rows [N, D] by one matrix [D, F]; or rows [N, F] by its transpose. In the dtype of `rows`."""
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))
    matrix = dequantise(matrix, rows.dtype)
    return lax.dot_general(rows, matrix, contracted, preferred_element_type=jnp.float32).astype(rows.dtype)


def _map_blocks(function, rows, weights, sizes):
    """One call of the function a block, groups in order, as many blocks as the groups need and no more.

    The last block of a group runs over into the rows of the next one, whose own blocks come later and overwrite what
    it wrote there: so groups need no padding, and only the end of the arrays has some.
    """
    n = len(rows[0])
    block = min(BLOCK_ROWS, n)
    blocks_up_to = jnp.cumsum(-(-sizes // block))  # [E] blocks of this group and those before it
    first_block = blocks_up_to - -(-sizes // block)
    first_row = jnp.cumsum(sizes) - sizes
    padded = [jnp.pad(array, ((0, block), *((0, 0) for _ in array.shape[1:]))) for array in rows]

    def compute(start, group):
        own_rows = [lax.dynamic_slice_in_dim(array, start, block) for array in padded]
        own = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, group, keepdims=False), weights)
        return function(plain_matmul, *own_rows, *own)

    def step(i, out):
        group = jnp.searchsorted(blocks_up_to, i, side="right")
        start = first_row[group] + (i - first_block[group]) * block
        new = compute(start, group)
        return tuple(
            lax.dynamic_update_slice_in_dim(held, part, start, 0) for held, part in zip(out, new, strict=True)
        )

    shapes = jax.eval_shape(compute, jnp.int32(0), jnp.int32(0))
    out = tuple(jnp.zeros((n + block, *leaf.shape[1:]), leaf.dtype) for leaf in shapes)
    return tuple(array[:n] for array in lax.fori_loop(0, blocks_up_to[-1], step, out))
