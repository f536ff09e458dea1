"""Rows in consecutive groups, each group computed with matrices of its own."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from flex_jax.ops.grouped_kernel import grouped_matmul_kernel, row_blocks
from flex_jax.ops.quantised import Quantised, dequantise

BLOCK_ROWS = 256  # rows of a CPU step: a half-empty block of each group is wasted, smaller ones multiply more slowly
TRITON_CAPABILITY = 8.0  # of the NVIDIA GPUs that Triton compiles for, from Ampere on

Matmul = Callable[..., jax.Array]  # (rows, stack of matrices, transposed=False) -> rows


def map_groups(
    function: Callable,
    rows: tuple[jax.Array, ...],
    stacks: tuple[jax.Array | Quantised, ...],
    layer: jax.Array | int,
    sizes: jax.Array,
) -> tuple[jax.Array, ...]:
    """function(matmul, *rows, *stacks), each group of rows with its own matrices.

    rows: arrays [N, ...] sorted by group; stacks: matrices [L, E, D, F], of which those of one layer are meant; sizes
    [E] int32, of a sum of at most N: what comes of the rows after that is finite and of no meaning. The function is one
    of single rows, made of elementwise operations and of `matmul(rows, stack, transposed=False)`; it returns arrays
    [N, ...]. Products are accumulated in float32.

    On accelerators it runs once, with `grouped_matmul`. On CPU, where a grouped matmul is a masked dense product over
    all E groups, it runs on one block of rows after another, all of its matmuls while the block is in the cache.
    """
    if jax.default_backend() == "cpu":
        return _map_blocks(function, rows, stacks, layer, sizes)
    return function(partial(grouped_matmul, layer=layer, sizes=sizes), *rows, *stacks)


def grouped_matmul(
    rows: jax.Array, stack: jax.Array | Quantised, transposed: bool = False, *, layer: jax.Array | int, sizes: jax.Array
) -> jax.Array:
    """rows [N, D], or [N, F] where `transposed`, by the matrices [E, D, F] of a layer or their transposes.

    stack: those of all layers, [L, E, D, F]; sizes [E] int32. On GPUs that Triton compiles for by the kernel beside
    this file, which reads a plain layer in its place; elsewhere by `lax.ragged_dot`. Quantised matrices are
    dequantised first, one layer's at a time. Returns the dtype of `rows`; zero for rows after the last group.
    """
    if _has_triton():
        if isinstance(stack, Quantised) or stack.dtype != rows.dtype:
            matrices, first = dequantise(of_layer(stack, layer), rows.dtype), 0
        else:
            matrices, first = _flat(stack), layer * len(sizes)
        product = grouped_matmul_kernel(rows, matrices, sizes, first, transposed)
    else:
        matrices = dequantise(of_layer(stack, layer), rows.dtype)
        if transposed:
            matrices = jnp.swapaxes(matrices, 1, 2)
        product = lax.ragged_dot(rows, matrices, sizes, preferred_element_type=jnp.float32).astype(rows.dtype)
    grouped = jnp.arange(len(rows)) < sizes.sum()  # kernels differ in what they leave in the other rows
    return jnp.where(grouped[:, None], product, jnp.zeros_like(product))


def _has_triton() -> bool:
    if jax.default_backend() != "gpu":
        return False
    capability = jax.devices()[0].compute_capability  # "9.0", or a name such as "gfx942" on GPUs of other makers
    return capability.replace(".", "").isdigit() and float(capability) >= TRITON_CAPABILITY


def plain_matmul(rows: jax.Array, matrix: jax.Array | Quantised, transposed: bool = False) -> jax.Array:
    """rows [N, D] by one matrix [D, F]; or rows [N, F] by its transpose. In the dtype of `rows`."""
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))
    matrix = dequantise(matrix, rows.dtype)
    return lax.dot_general(rows, matrix, contracted, preferred_element_type=jnp.float32).astype(rows.dtype)


def of_layer(stack: jax.Array | Quantised, layer: jax.Array | int) -> jax.Array | Quantised:
    """The matrices [E, D, F] of one layer: a copy of them."""
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, layer, keepdims=False), stack)


def _flat(stacks):
    """[L * E, D, F] of each: no copy."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stacks)


def _map_blocks(function, rows, stacks, layer, sizes):
    """One call of the function a block, groups in order, as many blocks as the groups need and no more.

    The last block of a group runs over into the rows of the next one, whose own blocks come later and overwrite what
    it wrote there: so groups need no padding, and only the end of the arrays has some.
    """
    n = len(rows[0])
    block = min(BLOCK_ROWS, n)
    groups, starts, _ = row_blocks(sizes, block, -(-n // block) + len(sizes))
    padded = [jnp.pad(array, ((0, block), *((0, 0) for _ in array.shape[1:]))) for array in rows]
    matrices, first = _flat(stacks), layer * len(sizes)

    def compute(start, group):
        own_rows = [lax.dynamic_slice_in_dim(array, start, block) for array in padded]
        own = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, first + group, keepdims=False), matrices)
        return function(plain_matmul, *own_rows, *own)

    def step(i, out):
        new = compute(starts[i], groups[i])
        return tuple(
            lax.dynamic_update_slice_in_dim(held, part, starts[i], 0) for held, part in zip(out, new, strict=True)
        )

    shapes = jax.eval_shape(compute, jnp.int32(0), jnp.int32(0))
    out = tuple(jnp.zeros((n + block, *leaf.shape[1:]), leaf.dtype) for leaf in shapes)
    return tuple(array[:n] for array in lax.fori_loop(0, (-(-sizes // block)).sum(), step, out))
