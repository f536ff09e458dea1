"""Grouped-query attention over given keys."""

import jax
import jax.numpy as jnp


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """softmax(q k' / sqrt(d)) v, [B, S, H, d].

    query [B, S, H, d]; key, value [B, T, G, d], each serving H / G query heads; mask [B or 1, 1, S or 1, T] boolean,
    True where a query may look; None is causal, with S = T. `jax.nn.dot_product_attention` on accelerators (fused
    where the device has it); on CPU, where that takes twice as long, the query heads of a group are the rows of one
    matmul with its keys.
    """
    if jax.default_backend() != "cpu":
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=mask is None)
    batch, queries, heads, size = query.shape
    groups, keys = key.shape[2], key.shape[1]
    rows = query.reshape(batch, queries, groups, -1, size).transpose(0, 2, 1, 3, 4).reshape(batch, groups, -1, size)
    scores = rows @ key.transpose(0, 2, 3, 1) * size**-0.5
    scores = scores.astype(jnp.float32).reshape(batch, groups, queries, -1, keys)
    if mask is None:
        mask = jnp.tril(jnp.ones((queries, keys), bool))[None, None]
    scores = jnp.where(mask[:, :, :, None], scores, jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores).astype(value.dtype).reshape(batch, groups, -1, keys)
    out = (shares @ value.transpose(0, 2, 1, 3)).reshape(batch, groups, queries, -1, size)
    return out.transpose(0, 2, 1, 3, 4).reshape(batch, queries, heads, size)
