"""Cross-entropy at the positions that have a loss, a few at a time: the logits of a batch never exist as a whole."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from flex_jax.ops.folding import fold_clients

ROWS = 512  # positions whose logits exist at one time; so many that a GPU computes them no slower than it reads `head`


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def token_cross_entropy(
    features: jax.Array, head: jax.Array, targets: jax.Array, wanted: jax.Array, rows: int = ROWS
) -> jax.Array:
    """-log softmax(features head')[target], in nats, of the wanted positions, and zero at the others: [T] float32.

    features [T, D]; head [V, D], frozen: it gets no gradient; targets [T] int32 in [0, V); wanted [T] boolean. Under
    `vmap` over clients their positions are joined, so that only wanted ones are computed, `rows` at a time.

    With a gradient, the forward pass makes that of each position's loss beside it, while its logits are at hand. Floor,
    in multiply-adds a wanted position: D V for the loss, D V for the gradient; memory `rows` x V logits.
    """
    return _folded(rows, False)(features, head, targets, wanted)[0]


def _folded(rows: int, with_gradient: bool):
    return fold_clients(partial(_compute, rows, with_gradient), frozen=(1,))


def _compute(rows, with_gradient, features, head, targets, wanted):
    """The losses [T], and their gradients [T, D] where asked for: (losses,) or (losses, gradients)."""
    tokens = len(features)
    rows = min(rows, tokens)
    # The wanted positions first, then ones that do not exist: reading them gives zeros, writing them nothing.
    (order,) = jnp.nonzero(wanted, size=-(-tokens // rows) * rows, fill_value=tokens)

    def step(i, out):
        positions = lax.dynamic_slice_in_dim(order, i * rows, rows)
        own, target = (array.at[positions].get(mode="fill", fill_value=0) for array in (features, targets))
        logits = jnp.einsum("rd,vd->rv", own, head, preferred_element_type=jnp.float32)
        log_normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        new = [(log_normaliser - jnp.take_along_axis(logits, target[:, None], axis=-1))[:, 0]]
        if with_gradient:
            d_logits = jnp.exp(logits - log_normaliser) - (jnp.arange(len(head)) == target[:, None])
            new.append(jnp.einsum("rv,vd->rd", d_logits.astype(head.dtype), head, preferred_element_type=jnp.float32))
        return tuple(
            held.at[positions].set(part.astype(held.dtype), mode="drop") for held, part in zip(out, new, strict=True)
        )

    out = (jnp.zeros(tokens, jnp.float32), *([jnp.zeros_like(features)] if with_gradient else []))
    return lax.fori_loop(0, -(-wanted.sum() // rows), step, out)


def _forward(features, head, targets, wanted, rows):
    return _folded(rows, True)(features, head, targets, wanted)


def _backward(rows, gradients, d_loss):
    return gradients * d_loss[:, None].astype(gradients.dtype), None, None, None


token_cross_entropy.defvjp(_forward, _backward)
