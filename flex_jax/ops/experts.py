"""Sparse expert computation: y_t = sum_k w_tk E_{i_tk}(x_t), with SwiGLU experts E(x) = (silu(x G) * x U) W."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from flex_jax.ops.batching import merge_batch_axis
from flex_jax.ops.grouped import grouped_apply, layer_slice
from flex_jax.ops.quantised import Matrices, dequantise
from flex_jax.ops.remat import checkpoint_product


class ExpertWeights(NamedTuple):
    """The E SwiGLU experts of one layer, read in place from the stacks of all L layers."""

    gate_up: Matrices  # [L, E, D, 2F]: the gate projection, then the up projection
    down: Matrices  # [L, E, F, D]
    layer: Array | int = 0

    def dequantised(self, dtype=None) -> tuple[Array, Array]:
        """Returns a plain copy of the layer's experts: gate_up [E, D, 2F] and down [E, F, D]."""
        gate_up, down = (dequantise(layer_slice(stack, self.layer), dtype) for stack in (self.gate_up, self.down))
        return gate_up, down


def swiglu(hidden: Array) -> Array:
    """Returns silu(first half) * second half: [..., 2F] -> [..., F]."""
    gate, up = jnp.split(hidden, 2, axis=-1)
    return jax.nn.silu(gate) * up


def dense_experts(x: Array, weights: ExpertWeights, expert_index: Array, routing_weight: Array) -> Array:
    """The readable reference: every expert on every token. It costs E / K times the work; everything is differentiable.

    Maps x [T, D] to [T, D]. expert_index int32 [T, K] has the experts of each token, and routing_weight [T, K] their
    weights. Index E stands for an expert that is not among the weights; its routing weight must be 0.
    """
    gate_up, down = weights.dequantised(x.dtype)
    outputs = jnp.einsum("tef,efd->ted", swiglu(jnp.einsum("td,edf->tef", x, gate_up)), down)
    routing = jnp.zeros((x.shape[0], outputs.shape[1]), x.dtype)
    routing = routing.at[jnp.arange(x.shape[0])[:, None], expert_index].add(routing_weight.astype(x.dtype))
    return jnp.einsum("te,ted->td", routing, outputs)


@jax.custom_vjp
def frozen_experts(x: Array, weights: ExpertWeights, expert_index: Array, routing_weight: Array) -> Array:
    """Computes `dense_experts` with K / E of its work, for experts that are not trained. No token is dropped.

    Gradients flow to `x` and `routing_weight`, not to the experts. Under `vmap` over C clients, one set of grouped
    matmuls runs on C times the tokens. A `vmap` over the weights raises ValueError.

    Work in multiply-adds per token: 3 K D F forward and 3 K D F backward, which needs the hidden layer [T, K, 2F].
    """
    return _forward(x, weights, expert_index, routing_weight)[0]


def _sort(expert_index: Array, num_experts: int):
    """Returns the order of the T*K assignments by expert, its inverse [T, K], and the number of each expert's."""
    flat = expert_index.reshape(-1)
    hits = (flat[:, None] == jnp.arange(num_experts + 1)).astype(jnp.int32)  # last column: experts that are not here
    cumulative = jnp.cumsum(hits, axis=0)
    sizes = cumulative[-1]
    inverse = (hits * (cumulative - 1 + jnp.cumsum(sizes) - sizes)).sum(1)
    order = jnp.zeros_like(inverse).at[inverse].set(jnp.arange(len(flat), dtype=jnp.int32), unique_indices=True)
    return order, inverse.reshape(expert_index.shape), sizes[:-1]


def _sum_assignments(outputs: Array, inverse: Array) -> Array:
    """Sums the K sorted outputs of each token, [T*K, D] -> [T, D]. Unrolled, so that no array [T, K, D] exists."""
    return sum((outputs[inverse[:, k]] for k in range(1, inverse.shape[1])), start=outputs[inverse[:, 0]])


def _forward_sorted(matmul, x, routing_weight, gate_up, down):
    hidden = matmul(x, gate_up)
    return matmul(swiglu(hidden), down) * routing_weight[:, None], hidden


def _backward_sorted(matmul, hidden, routing_weight, dy, gate_up, down):
    activation, pull_back = jax.vjp(swiglu, hidden)
    # <dy, a W> = <dy W', a>: the routing weight's gradient needs no second pass through the down projection
    d_activation = matmul(dy, down, transposed=True)
    d_weight = jnp.einsum("nf,nf->n", d_activation, activation, preferred_element_type=jnp.float32)
    (d_hidden,) = pull_back(d_activation * routing_weight[:, None])
    return matmul(d_hidden, gate_up, transposed=True), d_weight


def _forward_tokens(x, weights, expert_index, routing_weight):
    """Returns (y [T, D], hidden [T, K, 2F])."""
    order, inverse, sizes = _sort(expert_index, weights.down.shape[1])
    assigned = x[order // expert_index.shape[1]], routing_weight.reshape(-1)[order].astype(x.dtype)
    outputs, hidden = grouped_apply(_forward_sorted, assigned, weights[:2], weights.layer, sizes)
    return _sum_assignments(outputs, inverse), hidden[inverse]


def _backward_tokens(hidden, weights, expert_index, routing_weight, dy):
    order, inverse, sizes = _sort(expert_index, weights.down.shape[1])
    hidden = hidden.reshape(len(order), -1)[order]
    assigned = hidden, routing_weight.reshape(-1)[order].astype(hidden.dtype), dy[order // expert_index.shape[1]]
    dx, d_weight = grouped_apply(_backward_sorted, assigned, weights[:2], weights.layer, sizes)
    return _sum_assignments(dx, inverse), d_weight[inverse].astype(routing_weight.dtype)


_forward = merge_batch_axis(_forward_tokens, frozen=(1,))
_backward = merge_batch_axis(_backward_tokens, frozen=(1,))


def _frozen_experts_fwd(x, weights, expert_index, routing_weight):
    y, hidden = _forward(x, weights, expert_index, routing_weight)
    return y, (checkpoint_product(hidden), weights, expert_index, routing_weight)


def _frozen_experts_bwd(residuals, dy):
    hidden, weights, expert_index, routing_weight = residuals
    dx, d_weight = _backward(hidden, weights, expert_index, routing_weight, dy.astype(hidden.dtype))
    return dx, None, None, d_weight


frozen_experts.defvjp(_frozen_experts_fwd, _frozen_experts_bwd)


def gather_experts(stack: Matrices, layer: Array | int, expert_index: Array) -> Matrices:
    """Returns the matrices [r, D, F] of the experts expert_index [r] of a layer, from a stack [L, E, D, F]."""
    return jax.tree.map(lambda leaf: leaf[layer, expert_index], stack)


class ExpertOps(NamedTuple):
    """What a layer does with its frozen experts. On a mesh that divides the experts, other functions replace these."""

    apply: Callable[..., Array] = frozen_experts  # arguments and result of `dense_experts`
    gather: Callable[..., Matrices] = gather_experts
