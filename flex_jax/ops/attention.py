"""Grouped-query attention over given keys."""

import jax
import jax.numpy as jnp
from jax import lax

FLASH_DTYPES = (jnp.bfloat16, jnp.float16)
FLASH_SIZE = 128  # the largest head that cuDNN's flash attention takes on every GPU that has it
MASKED_SCORE = -1e30


def has_flash(dtype, size: int) -> bool:
    """Whether causal attention with heads of this size is flash attention, which stores no scores."""
    return jax.default_backend() == "gpu" and dtype in FLASH_DTYPES and size <= FLASH_SIZE


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, scale: float) -> jax.Array:
    """Returns softmax(scale q k') v, [B, S, H, v].

    query is [B, S, H, d], key [B, T, G, d] and value [B, T, G, v] with v <= d: each of the G heads serves H / G query
    heads. The boolean mask [B or 1, 1, S or 1, T] is True where a query may look; None is causal, with S = T.

    On accelerators this is `jax.nn.dot_product_attention`, with cuDNN's flash attention if the mask is causal, the
    dtype has 16 bits and a head has at most 128 dimensions. On CPU that function takes twice as long as one matmul of
    all query heads of a group with the group's keys, which is used there.
    """
    if jax.default_backend() == "cpu":
        return _attention_on_cpu(query, key, value, mask, scale)
    causal, size, value_size = mask is None, key.shape[-1], value.shape[-1]
    kind = "cudnn" if causal and has_flash(query.dtype, size) else None
    value = jnp.pad(value, (*((0, 0),) * 3, (0, size - value_size)))  # the fused operator needs equal sizes
    y = jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale, is_causal=causal, implementation=kind)
    return y[..., :value_size]


def _attention_on_cpu(query, key, value, mask, scale):
    batch, num_queries, num_heads, _ = query.shape
    num_groups, num_keys = key.shape[2], key.shape[1]
    if mask is None:
        mask = jnp.tril(jnp.ones((num_queries, num_keys), bool))[None, None]
    query, key, value = (array.transpose(0, 2, 1, 3) for array in (query * scale, key, value))
    grouped = query.reshape(batch, num_groups, -1, query.shape[-1])  # the queries of a group's heads, head after head
    scores = _matmul(grouped, key, (3, 3)).astype(jnp.float32)
    additive_mask = jnp.broadcast_to(jnp.where(mask, 0.0, MASKED_SCORE), (len(mask), 1, num_queries, num_keys))
    probabilities = jax.nn.softmax(scores + jnp.tile(additive_mask, (1, 1, num_heads // num_groups, 1)))
    y = _matmul(probabilities.astype(value.dtype), value, (3, 2))
    return y.reshape(batch, num_heads, num_queries, -1).transpose(0, 2, 1, 3)


def _matmul(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """Multiplies matrices in the last two axes. The axes before them are batch axes."""
    return lax.dot_general(a, b, ((contracted[:1], contracted[1:]), ((0, 1), (0, 1))))
