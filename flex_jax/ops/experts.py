"""Sparse expert computation: y_t = sum_k w_tk E_{i_tk}(x_t), with SwiGLU experts E(x) = (silu(x G) * x U) W."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flex_jax.ops.folding import fold_clients
from flex_jax.ops.grouped import map_groups, of_layer
from flex_jax.ops.quantised import Quantised, dequantise
from flex_jax.ops.saved import saved


class ExpertWeights(NamedTuple):
    """The E SwiGLU experts of one layer, plain or quantised, in stacks of L layers: they are read in their place, for
    they are most of a model's bytes. `gate_up` holds the gate projection, then the up projection."""

    gate_up: jax.Array | Quantised  # [L, E, D, 2F]
    down: jax.Array | Quantised  # [L, E, F, D]
    layer: jax.Array | int = 0

    def own(self, dtype=None) -> tuple[jax.Array, jax.Array]:
        """Those of the layer as plain numbers, gate_up [E, D, 2F] and down [E, F, D]: a copy."""
        return tuple(dequantise(of_layer(stack, self.layer), dtype) for stack in (self.gate_up, self.down))


def swiglu(hidden: jax.Array) -> jax.Array:
    """silu of the first half times the second half: [..., 2F] -> [..., F]."""
    gate, up = jnp.split(hidden, 2, axis=-1)
    return jax.nn.silu(gate) * up


def dense_experts(x: jax.Array, weights: ExpertWeights, index: jax.Array, weight: jax.Array) -> jax.Array:
    """The readable reference: every expert on every token, E / K times the work, differentiable in everything.

    x [T, D]; index [T, K] int32, the experts of each token; weight [T, K], their routing weights; an index of E with a
    weight of 0 stands for an expert that is not among these. Returns [T, D].
    """
    gate_up, down = weights.own(x.dtype)
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

    Floor, in multiply-adds a token: forward 3 K D F, backward 3 K D F; the hidden layer [T, K, 2F] is kept for it.
    """
    return _forward(x, weights, index, weight)[0]


def _sort(index: jax.Array, num_experts: int):
    """Order of the T*K (token, expert) assignments by expert, its inverse [T, K], and how many each expert has."""
    flat = index.reshape(-1)
    hits = (flat[:, None] == jnp.arange(num_experts + 1)).astype(jnp.int32)  # the last: of no expert here
    upto = jnp.cumsum(hits, axis=0)
    sizes = upto[-1]
    inverse = (hits * (upto - 1 + jnp.cumsum(sizes) - sizes)).sum(1)
    order = jnp.zeros_like(inverse).at[inverse].set(jnp.arange(len(flat), dtype=jnp.int32), unique_indices=True)
    return order, inverse.reshape(index.shape), sizes[:-1]


def _sum_of_token(rows: jax.Array, inverse: jax.Array) -> jax.Array:
    """The sum of a token's K rows: sorted rows [T*K, D] -> [T, D]. Written out: one pass, with no array [T, K, D]."""
    return sum(rows[inverse[:, k]] for k in range(inverse.shape[1]))


def _forward_rows(matmul, x, weight, gate_up, down):
    hidden = matmul(x, gate_up)
    return matmul(swiglu(hidden), down) * weight[:, None], hidden


def _backward_rows(matmul, hidden, weight, dy, gate_up, down):
    activation, pull_back = jax.vjp(swiglu, hidden)
    # <dy, a W> = <dy W', a>: the routing weight's gradient needs no second pass through the down projection
    d_activation = matmul(dy, down, transposed=True)
    d_weight = jnp.einsum("nf,nf->n", d_activation, activation, preferred_element_type=jnp.float32)
    (d_hidden,) = pull_back(d_activation * weight[:, None])
    return matmul(d_hidden, gate_up, transposed=True), d_weight


def _forward_tokens(x, weights, index, weight):
    """(y [T, D], hidden [T, K, 2F])"""
    order, inverse, sizes = _sort(index, weights.down.shape[1])
    rows = x[order // index.shape[1]], weight.reshape(-1)[order].astype(x.dtype)
    outputs, hidden = map_groups(_forward_rows, rows, weights[:2], weights.layer, sizes)
    return _sum_of_token(outputs, inverse), hidden[inverse]


def _backward_tokens(hidden, weights, index, weight, dy):
    order, inverse, sizes = _sort(index, weights.down.shape[1])
    hidden = hidden.reshape(len(order), -1)[order]
    rows = hidden, weight.reshape(-1)[order].astype(hidden.dtype), dy[order // index.shape[1]]
    dx, d_weight = map_groups(_backward_rows, rows, weights[:2], weights.layer, sizes)
    return _sum_of_token(dx, inverse), d_weight[inverse].astype(weight.dtype)


_forward = fold_clients(_forward_tokens, frozen=(1,))
_backward = fold_clients(_backward_tokens, frozen=(1,))


def _frozen_experts_fwd(x, weights, index, weight):
    y, hidden = _forward(x, weights, index, weight)
    return y, (saved(hidden), weights, index, weight)


def _frozen_experts_bwd(residuals, dy):
    hidden, weights, index, weight = residuals
    dx, d_weight = _backward(hidden, weights, index, weight, dy.astype(hidden.dtype))
    return dx, None, None, d_weight


frozen_experts.defvjp(_frozen_experts_fwd, _frozen_experts_bwd)


def take_experts(stack: jax.Array | Quantised, layer: jax.Array | int, chosen: jax.Array) -> jax.Array | Quantised:
    """The matrices [r, D, F] of the experts chosen [r] of a layer, from all [L, E, D, F]."""
    return jax.tree.map(lambda leaf: leaf[layer, chosen], stack)


class Experts(NamedTuple):
    """What a layer does with its frozen experts; where devices divide them, others take the place of these."""

    apply: Callable[..., jax.Array] = frozen_experts  # arguments and result as of `dense_experts`
    take: Callable[..., jax.Array | Quantised] = take_experts
