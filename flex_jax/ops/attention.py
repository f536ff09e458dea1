"""Grouped-query attention over given keys."""

import jax
import jax.numpy as jnp


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, scale: float) -> jax.Array:
    """softmax(scale q k') v, [B, S, H, v].

    query [B, S, H, d]; key [B, T, G, d] and value [B, T, G, v], v <= d, each serving H / G query heads; mask
    [B or 1, 1, S or 1, T] boolean, True where a query may look; None is causal, with S = T.
    `jax.nn.dot_product_attention` on accelerators (fused where the device has it); on CPU, where that takes twice as
    long, the query heads of a group are the rows of one matmul with its keys.
    """
    if jax.default_backend() != "cpu":
        missing = key.shape[-1] - value.shape[-1]  # the fused operator wants keys and values of one size
        padded = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, missing)))
        y = jax.nn.dot_product_attention(query, key, padded, mask=mask, scale=scale, is_causal=mask is None)
        return y[..., : value.shape[-1]]
    batch, queries, heads, size = query.shape
    groups, keys = key.shape[2], key.shape[1]
    rows = query.reshape(batch, queries, groups, -1, size).transpose(0, 2, 1, 3, 4).reshape(batch, groups, -1, size)
    scores = rows @ key.transpose(0, 2, 3, 1) * scale
    scores = scores.astype(jnp.float32).reshape(batch, groups, queries, -1, keys)
    if mask is None:
        mask = jnp.tril(jnp.ones((queries, keys), bool))[None, None]
    scores = jnp.where(mask[:, :, :, None], scores, jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores).astype(value.dtype).reshape(batch, groups, -1, keys)
    out = (shares @ value.transpose(0, 2, 1, 3)).reshape(batch, groups, queries, -1, value.shape[-1])
    return out.transpose(0, 2, 1, 3, 4).reshape(batch, queries, heads, -1)
