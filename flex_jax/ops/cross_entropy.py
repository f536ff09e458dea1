"""Cross-entropy over a large vocabulary, in chunks of it: the logits of a batch never exist as a whole."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

CHUNK = 8192  # vocabulary entries whose logits exist at one time


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_cross_entropy(features: jax.Array, head: jax.Array, targets: jax.Array, chunk: int = CHUNK) -> jax.Array:
    """-log softmax(features head')[target], in nats, per position.

    features [..., D]; head [V, D], frozen: it gets no gradient; targets [...] int32 in [0, V). Returns [...] float32.
    A running maximum and sum over chunks of the vocabulary (online softmax); the backward pass computes each chunk's
    logits again. Floor, in multiply-adds a position: forward D V, backward 2 D V; memory one chunk of logits.
    """
    return _forward(features, head, targets, chunk)[0]


def _chunks(vocabulary: int, chunk: int) -> tuple[int, int]:
    chunk = min(chunk, vocabulary)
    return chunk, -(-vocabulary // chunk)


def _logits(features, head, chunk, i):
    """Logits of chunk i [..., chunk] and the vocabulary entries they stand for [chunk].

    The last chunk starts earlier rather than beyond the end; entries that the one before has counted are minus
    infinity here.
    """
    start = jnp.minimum(i * chunk, head.shape[0] - chunk)
    rows = lax.dynamic_slice_in_dim(head, start, chunk)
    entries = start + jnp.arange(chunk)
    logits = jnp.einsum("...d,vd->...v", features, rows, preferred_element_type=jnp.float32)
    return jnp.where(entries >= i * chunk, logits, -jnp.inf), entries, rows


def _forward(features, head, targets, chunk):
    chunk, count = _chunks(head.shape[0], chunk)

    def accumulate(i, carry):
        maximum, total, target_logit = carry
        logits, entries, _ = _logits(features, head, chunk, i)
        new_maximum = jnp.maximum(maximum, logits.max(-1))
        total = total * jnp.exp(maximum - new_maximum) + jnp.exp(logits - new_maximum[..., None]).sum(-1)
        hit = (targets[..., None] == entries) & (entries >= i * chunk)
        return new_maximum, total, target_logit + jnp.where(hit, logits, 0.0).sum(-1)

    zeros = jnp.zeros(targets.shape, jnp.float32)
    maximum, total, target_logit = lax.fori_loop(0, count, accumulate, (zeros - jnp.inf, zeros, zeros))
    log_normaliser = maximum + jnp.log(total)
    return log_normaliser - target_logit, log_normaliser


def _cross_entropy_fwd(features, head, targets, chunk):
    loss, log_normaliser = _forward(features, head, targets, chunk)
    return loss, (features, head, targets, log_normaliser)


def _cross_entropy_bwd(chunk, residuals, d_loss):
    features, head, targets, log_normaliser = residuals
    chunk, count = _chunks(head.shape[0], chunk)

    def accumulate(i, d_features):
        logits, entries, rows = _logits(features, head, chunk, i)
        hit = (targets[..., None] == entries) & (entries >= i * chunk)
        d_logits = (jnp.exp(logits - log_normaliser[..., None]) - hit) * d_loss[..., None]
        return d_features + jnp.einsum(
            "...v,vd->...d", d_logits.astype(rows.dtype), rows, preferred_element_type=jnp.float32
        )

    d_features = lax.fori_loop(0, count, accumulate, jnp.zeros(features.shape, jnp.float32))
    return d_features.astype(features.dtype), None, None


token_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)
