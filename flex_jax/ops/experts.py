"""Sparse expert computation: y_t = sum_k w_tk E_{i_tk}(x_t), with SwiGLU experts E(x) = (silu(x G) * x U) W."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flex_jax.ops.grouped import grouped_matmul
from flex_jax.ops.quantised import Quantised, dequantise


class ExpertWeights(NamedTuple):
    """E stacked SwiGLU experts, plain or quantised; `gate_up` holds the gate projection, then the up projection."""

    gate_up: jax.Array | Quantised  # [E, D, 2F]
    down: jax.Array | Quantised  # [E, F, D]


def swiglu(hidden: jax.Array) -> jax.Array:
    """silu of the first half times the second half: [..., 2F] -> [..., F]."""
    gate, up = jnp.split(hidden, 2, axis=-1)
    return jax.nn.silu(gate) * up


def dense_experts(x: jax.Array, weights: ExpertWeights, index: jax.Array, weight: jax.Array) -> jax.Array:
    """The readable reference: every expert on every token, E / K times the work, differentiable in everything.

    x [T, D]; index [T, K] int32, the experts of each token; weight [T, K], their routing weights. Returns [T, D].
    """
    gate_up, down = (dequantise(matrices, x.dtype) for matrices in weights)
    every = jnp.einsum("tef,efd->ted", swiglu(jnp.einsum("td,edf->tef", x, gate_up)), down)
    routing = jnp.zeros((x.shape[0], every.shape[1]), x.dtype)
    routing = routing.at[jnp.arange(x.shape[0])[:, None], index].add(weight.astype(x.dtype))
    return jnp.einsum("te,ted->td", routing, every)


@jax.custom_vjp
def frozen_experts(x: jax.Array, weights: ExpertWeights, index: jax.Array, weight: jax.Array) -> jax.Array:
    """`dense_experts` at K / E of its work, dropless, for experts that are not trained.

    Same arguments and result. Gradients flow to `x` and `weight`; to the experts none, as if by `lax.stop_gradient`.
    Under `vmap` over clients (`weights` unbatched) the client axis joins the token axis, so that C clients cost one
    set of grouped matmuls on C times the tokens. Raises ValueError when a `vmap` would batch the weights.

    Floor, in multiply-adds a token: forward 3 K D F; backward 5 K D F, of which 2 recompute the hidden layer.
    """
    return _forward(x, *weights, index, weight)


def _sort(index: jax.Array, num_experts: int):
    """Order of the T*K (token, expert) assignments by expert, its inverse, and how many each expert has."""
    flat = index.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)), unique_indices=True)
    return order, inverse, jnp.bincount(flat, length=num_experts).astype(jnp.int32)


def _forward_tokens(x, gate_up, down, index, weight):
    tokens, k = index.shape
    order, inverse, sizes = _sort(index, gate_up.shape[0])
    activation = swiglu(grouped_matmul(x[order // k], gate_up, sizes))
    outputs = grouped_matmul(activation, down, sizes)[inverse].reshape(tokens, k, -1)
    return jnp.einsum("tkd,tk->td", outputs, weight.astype(x.dtype))


def _backward_tokens(x, gate_up, down, index, weight, dy):
    tokens, k = index.shape
    order, inverse, sizes = _sort(index, gate_up.shape[0])
    activation, pull_back = jax.vjp(swiglu, grouped_matmul(x[order // k], gate_up, sizes))
    # <dy, a W> = <dy W', a>: the routing weight's gradient needs no second pass through the down projection
    d_activation = grouped_matmul(dy[order // k].astype(x.dtype), down, sizes, transposed=True)
    d_weight = jnp.einsum("nf,nf->n", d_activation, activation, preferred_element_type=jnp.float32)
    routed = d_activation * weight.reshape(-1)[order][:, None].astype(x.dtype)
    (d_hidden,) = pull_back(routed)
    dx = grouped_matmul(d_hidden, gate_up, sizes, transposed=True)[inverse].reshape(tokens, k, -1).sum(1)
    return dx.astype(x.dtype), d_weight[inverse].reshape(tokens, k).astype(weight.dtype)


def _fold_clients(function, weight_arguments=(1, 2)):
    """`function` of per-token arrays and frozen weights, whose `vmap` folds the client axis into the token axis."""
    folded = jax.custom_batching.custom_vmap(function)

    @folded.def_vmap
    def rule(clients, batched, *arguments):
        if any(jax.tree.leaves([batched[i] for i in weight_arguments])):
            raise ValueError("frozen_experts cannot be vmapped over expert weights: clients share one frozen backbone")
        flat = []
        for i, (argument, is_batched) in enumerate(zip(arguments, batched, strict=True)):
            if i not in weight_arguments:
                if not is_batched:
                    argument = jnp.broadcast_to(argument, (clients, *argument.shape))
                argument = argument.reshape(-1, *argument.shape[2:])
            flat.append(argument)
        out = folded(*flat)
        split = jax.tree.map(lambda leaf: leaf.reshape(clients, -1, *leaf.shape[1:]), out)
        return split, jax.tree.map(lambda _: True, out)

    return folded


_forward = _fold_clients(_forward_tokens)
_backward = _fold_clients(_backward_tokens)


def _frozen_experts_fwd(x, weights, index, weight):
    return _forward(x, *weights, index, weight), (x, weights, index, weight)


def _frozen_experts_bwd(residuals, dy):
    x, weights, index, weight = residuals
    dx, d_weight = _backward(x, *weights, index, weight, dy)
    return dx, None, None, d_weight


frozen_experts.defvjp(_frozen_experts_fwd, _frozen_experts_bwd)
