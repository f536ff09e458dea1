"""Grouped matrix multiplication: consecutive groups of rows, each against a matrix of its own."""

import jax
import jax.numpy as jnp
from jax import lax

from flex_jax.ops.quantised import Quantised, dequantise

BLOCK_ROWS = 128  # rows a CPU step multiplies; small enough for the cache, large enough for the matmul


def grouped_matmul(
    rows: jax.Array, weights: jax.Array | Quantised, sizes: jax.Array, *, transposed: bool = False
) -> jax.Array:
    """Multiply each group of rows by its own matrix, or by its transpose.

    rows [N, D], sorted by group; weights [E, D, F], or [E, F, D] where `transposed`; sizes [E] int32, summing to N.
    Returns [N, F] in the dtype of `rows`, accumulated in float32. `lax.ragged_dot` on accelerators, quantised weights
    being dequantised first, one layer's at a time; on CPU, where that is a masked dense product over all E groups, a
    loop over blocks of rows, each of which dequantises its own expert.
    """
    if jax.default_backend() == "cpu":
        return _blocked(rows, weights, sizes, transposed)
    weights = dequantise(weights, rows.dtype)
    if transposed:
        weights = jnp.swapaxes(weights, 1, 2)
    return lax.ragged_dot(rows, weights, sizes, preferred_element_type=jnp.float32).astype(rows.dtype)


def _blocked(rows: jax.Array, weights: jax.Array | Quantised, sizes: jax.Array, transposed: bool) -> jax.Array:
    """One matmul a block, groups in order, as many blocks as the groups need and no more.

    The last block of a group runs over into the rows of the next one, whose own blocks come later and overwrite what
    it wrote there: so groups need no padding, and only the end of the array has some.
    """
    n = rows.shape[0]
    block = min(BLOCK_ROWS, n)
    blocks_up_to = jnp.cumsum(-(-sizes // block))  # [E] blocks of this group and those before it
    group_starts = jnp.cumsum(sizes) - sizes
    padded = jnp.pad(rows, ((0, block), (0, 0)))

    def multiply(i, out):
        group = jnp.searchsorted(blocks_up_to, i, side="right")
        block_in_group = i - jnp.where(group > 0, blocks_up_to[group - 1], 0)
        start = group_starts[group] + block_in_group * block
        own = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, group, keepdims=False), weights)
        matrix = dequantise(own, rows.dtype)
        product = lax.dot_general(
            lax.dynamic_slice_in_dim(padded, start, block),
            matrix,
            (((1,), (1 if transposed else 0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return lax.dynamic_update_slice_in_dim(out, product.astype(out.dtype), start, 0)

    out = jnp.zeros((n + block, weights.shape[1 if transposed else 2]), rows.dtype)
    return lax.fori_loop(0, blocks_up_to[-1], multiply, out)[:n]
