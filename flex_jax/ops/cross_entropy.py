"""Cross-entropy of the positions that have a loss, in chunks: the logits of a whole batch never exist."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from flex_jax.ops.batching import merge_batch_axis

LOGIT_CHUNK = 512  # positions whose logits exist at the same time; enough for a GPU to be bound by compute, not memory


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def token_cross_entropy(features: Array, head: Array, targets: Array, loss_mask: Array, chunk=LOGIT_CHUNK) -> Array:
    """Returns -log softmax(features head')[target] in nats, and zero outside of the loss mask: [T] float32.

    features is [T, D], head [V, D], targets int32 [T] in [0, V), and loss_mask boolean [T]. The head is frozen and gets
    no gradient. Under `vmap` over clients their positions are merged, so that only positions in the mask are computed.
    The forward pass computes the gradient, if there is one, from the same logits.

    Work in multiply-adds per position in the mask: D V for the loss and D V for the gradient. Memory: chunk * V logits.
    """
    return merge_batch_axis(partial(_compute, chunk, False), frozen=(1,))(features, head, targets, loss_mask)[0]


def _compute(chunk, with_gradient, features, head, targets, loss_mask):
    """Returns (losses [T],), or (losses [T], their gradients [T, D])."""
    num_tokens = len(features)
    chunk = min(chunk, num_tokens)
    # Positions in the mask come first. The positions after them do not exist: they are read as 0 and never written.
    size = -(-num_tokens // chunk) * chunk
    (order,) = jnp.nonzero(loss_mask, size=size, fill_value=num_tokens)

    def step(i, out):
        positions = lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        hidden, target = (array.at[positions].get(mode="fill", fill_value=0) for array in (features, targets))
        logits = jnp.einsum("rd,vd->rv", hidden, head, preferred_element_type=jnp.float32)
        log_normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        new = [(log_normaliser - jnp.take_along_axis(logits, target[:, None], axis=-1))[:, 0]]
        if with_gradient:
            d_logits = jnp.exp(logits - log_normaliser) - (jnp.arange(len(head)) == target[:, None])
            new.append(jnp.einsum("rv,vd->rd", d_logits.astype(head.dtype), head, preferred_element_type=jnp.float32))
        return tuple(o.at[positions].set(n.astype(o.dtype), mode="drop") for o, n in zip(out, new, strict=True))

    out = (jnp.zeros(num_tokens, jnp.float32), *([jnp.zeros_like(features)] if with_gradient else []))
    return lax.fori_loop(0, -(-loss_mask.sum() // chunk), step, out)


def _forward(features, head, targets, loss_mask, chunk):
    return merge_batch_axis(partial(_compute, chunk, True), frozen=(1,))(features, head, targets, loss_mask)


def _backward(chunk, gradients, d_loss):
    return gradients * d_loss[:, None].astype(gradients.dtype), None, None, None


token_cross_entropy.defvjp(_forward, _backward)
