"""Matmuls of tokens in consecutive groups: each group is multiplied by its matrix."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from flex_jax.ops.grouped_kernel import group_blocks, grouped_matmul_kernel
from flex_jax.ops.quantised import Matrices, Quantised, dequantise

CPU_BLOCK = 256  # tokens of a step on CPU: larger blocks waste more at the end of a group, smaller ones multiply slowly
TRITON_CAPABILITY = 8.0  # compute capability from which Triton compiles for NVIDIA GPUs (Ampere)


def grouped_apply(
    function: Callable, tokens: tuple[Array, ...], stacks: tuple[Matrices, ...], layer: Array | int, group_sizes: Array
) -> tuple[Array, ...]:
    """Returns function(matmul, *tokens, *stacks), where each group of tokens meets its matrices of the layer.

    The function acts on each token separately, with elementwise operations and matmul(tokens, stack, transposed=False).
    It returns a tuple of arrays [N, ...]. tokens are arrays [N, ...] sorted by group, stacks matrices [L, E, D, F], and
    group_sizes int32 [E]. Results after sum(group_sizes) are finite garbage. Products are accumulated in float32.

    On accelerators the function runs once, with `grouped_matmul`. On CPU that would be a masked dense product over all
    E groups: there, the function runs on one block of tokens after another, with all its matmuls on a cached block.
    """
    if jax.default_backend() == "cpu":
        return _apply_in_blocks(function, tokens, stacks, layer, group_sizes)
    return function(partial(grouped_matmul, layer=layer, group_sizes=group_sizes), *tokens, *stacks)


def grouped_matmul(
    tokens: Array, stack: Matrices, transposed: bool = False, *, layer: Array | int, group_sizes: Array
) -> Array:
    """Multiplies each group of tokens by its matrix [D, F] of a layer, or by the transposed matrix.

    tokens are [N, D], or [N, F] if `transposed`, sorted by group; stack [L, E, D, F] has the matrices of all layers.
    The result has the dtype of the tokens, and is zero after sum(group_sizes).

    GPUs that Triton compiles for use the kernel in grouped_kernel.py, which reads a plain stack in place. Other devices
    use `lax.ragged_dot` on a copy of the layer. Quantised matrices are dequantised first, one layer at a time.
    """
    if _has_triton():
        if isinstance(stack, Quantised) or stack.dtype != tokens.dtype:
            matrices, first = dequantise(layer_slice(stack, layer), tokens.dtype), 0
        else:
            matrices, first = _flat(stack), layer * len(group_sizes)
        product = grouped_matmul_kernel(tokens, matrices, group_sizes, first, transposed)
    else:
        matrices = dequantise(layer_slice(stack, layer), tokens.dtype)
        matrices = jnp.swapaxes(matrices, 1, 2) if transposed else matrices
        product = lax.ragged_dot(tokens, matrices, group_sizes, preferred_element_type=jnp.float32)
        product = product.astype(tokens.dtype)
    in_a_group = jnp.arange(len(tokens)) < group_sizes.sum()  # kernels differ in what they leave after the last group
    return jnp.where(in_a_group[:, None], product, jnp.zeros_like(product))


def _has_triton() -> bool:
    if jax.default_backend() != "gpu":
        return False
    capability = jax.devices()[0].compute_capability  # "9.0", or a name such as "gfx942" on GPUs of other makers
    return capability.replace(".", "").isdigit() and float(capability) >= TRITON_CAPABILITY


def layer_slice(stack: Matrices, layer: Array | int) -> Matrices:
    """Returns a copy of the matrices [E, D, F] of one layer."""
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, layer, keepdims=False), stack)


def _plain_matmul(tokens: Array, matrix: Matrices, transposed: bool = False) -> Array:
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))
    matrix = dequantise(matrix, tokens.dtype)
    return lax.dot_general(tokens, matrix, contracted, preferred_element_type=jnp.float32).astype(tokens.dtype)


def _flat(stacks):
    """Reshapes [L, E, D, F] to [L * E, D, F], without a copy."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stacks)


def _apply_in_blocks(function, tokens, stacks, layer, group_sizes):
    # The last block of a group runs over into the tokens of the next group, whose blocks come later and overwrite what
    # it wrote there. So the groups need no padding. Only the end of the arrays has some.
    n = len(tokens[0])
    block = min(CPU_BLOCK, n)
    groups, starts, _ = group_blocks(group_sizes, block, -(-n // block) + len(group_sizes))
    padded = [jnp.pad(array, ((0, block), *((0, 0) for _ in array.shape[1:]))) for array in tokens]
    matrices, first = _flat(stacks), layer * len(group_sizes)

    def compute(start, group):
        block_tokens = [lax.dynamic_slice_in_dim(array, start, block) for array in padded]
        matrix = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, first + group, keepdims=False), matrices)
        return function(_plain_matmul, *block_tokens, *matrix)

    def step(i, out):
        new, write = compute(starts[i], groups[i]), lax.dynamic_update_slice_in_dim
        return tuple(write(total, part, starts[i], 0) for total, part in zip(out, new, strict=True))

    shapes = jax.eval_shape(compute, jnp.int32(0), jnp.int32(0))
    out = tuple(jnp.zeros((n + block, *leaf.shape[1:]), leaf.dtype) for leaf in shapes)
    return tuple(array[:n] for array in lax.fori_loop(0, (-(-group_sizes // block)).sum(), step, out))
