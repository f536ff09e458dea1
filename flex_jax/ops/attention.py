"""Grouped-query attention over given keys."""

import jax
import jax.numpy as jnp
from jax import lax

FLASH_DTYPES = (jnp.bfloat16, jnp.float16)
UNSEEN = -1e30  # score of a key that a query must not see
FLASH_SIZE = 128  # the largest key that cuDNN's flash attention takes on every GPU that has it


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, scale: float) -> jax.Array:
    """softmax(scale q k') v, [B, S, H, v].

    query [B, S, H, d]; key [B, T, G, d] and value [B, T, G, v], v <= d, each serving H / G query heads; mask
    [B or 1, 1, S or 1, T] boolean, True where a query may look; None is causal, with S = T.
    On accelerators `jax.nn.dot_product_attention`, with cuDNN's flash attention for what that takes: causal, 16-bit,
    heads of up to 128. On CPU, where the former takes twice as long, the query heads of a group are the rows of one
    matmul with its keys.
    """
    if jax.default_backend() == "cpu":
        return _attention_on_cpu(query, key, value, mask, scale)
    missing = key.shape[-1] - value.shape[-1]  # the fused operator wants keys and values of one size
    padded = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, missing)))
    flash = jax.default_backend() == "gpu" and query.dtype in FLASH_DTYPES and key.shape[-1] <= FLASH_SIZE
    y = jax.nn.dot_product_attention(
        query,
        key,
        padded,
        mask=mask,
        scale=scale,
        is_causal=mask is None,
        implementation="cudnn" if flash and mask is None else None,
    )
    return y[..., : value.shape[-1]]


def _attention_on_cpu(query, key, value, mask, scale):
    batch, queries, heads, _ = query.shape
    groups, keys = key.shape[2], key.shape[1]
    if mask is None:
        mask = jnp.tril(jnp.ones((queries, keys), bool))[None, None]
    query, key, value = (array.transpose(0, 2, 1, 3) for array in (query * scale, key, value))
    rows = query.reshape(batch, groups, -1, query.shape[-1])
    scores = _matmul(rows, key, (3, 3)).astype(jnp.float32)
    # An additive mask for the rows of a group.
    unseen = jnp.broadcast_to(jnp.where(mask, 0.0, UNSEEN), (len(mask), 1, queries, keys))
    shares = jax.nn.softmax(scores + jnp.tile(unseen, (1, 1, heads // groups, 1)))
    y = _matmul(shares.astype(value.dtype), value, (3, 2))
    return y.reshape(batch, heads, queries, -1).transpose(0, 2, 1, 3)


def _matmul(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """Of matrices in the last two axes; the axes before them are a batch."""
    return lax.dot_general(a, b, ((contracted[:1], contracted[1:]), ((0, 1), (0, 1))))
