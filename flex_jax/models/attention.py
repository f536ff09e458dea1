"""Attention with rotary positions, a key-value cache and LoRA on the projections that make queries, keys and values.

Two kinds: grouped-query attention, and the multi-head latent attention of DeepSeek-V2.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flex_jax.models.config import LoraConfig, ModelConfig
from flex_jax.models.linear import Projection
from flex_jax.models.norm import RMSNorm
from flex_jax.models.rotary import rotate
from flex_jax.ops.attention import attention

LATENT_NORM_EPSILON = 1e-6  # in DeepSeek-V2 not the one of config.json


class Cache(NamedTuple):
    """Keys and values of the positions seen so far; [L, B, S, kv heads, size] outside the scan over layers."""

    key: jax.Array
    value: jax.Array


def adapted_projections(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the projections that make queries, keys and values: those that carry LoRA."""
    c = config
    if not c.latent_rank:
        keys = c.kv_heads * c.head_dim
        return {"q_proj": (c.width, c.heads * c.head_dim), "k_proj": (c.width, keys), "v_proj": (c.width, keys)}
    queries = c.heads * c.key_dim
    query = (
        {"q_a_proj": (c.width, c.query_rank), "q_b_proj": (c.query_rank, queries)}
        if c.query_rank
        else {"q_proj": (c.width, queries)}
    )
    return query | {
        "kv_a_proj": (c.width, c.latent_rank + c.rope_dim),
        "kv_b_proj": (c.latent_rank, c.heads * (c.nope_dim + c.value_dim)),
    }


def attend(config: ModelConfig, query, key, value, cache, positions, mask):
    """softmax(q k') v as [B, S, H * size], and the cache.

    query [B, S, H, size]; key, value [B, S, kv heads, size]; positions [B, S]; mask [B, 1, S or 1, keys] boolean, or
    None for causal. Without a cache the keys are the given ones. With one, they are written at `positions` of the cache
    first and every cached position up to the query's own is attended to.
    """
    if cache is not None:
        rows = jnp.arange(query.shape[0])[:, None]
        cache = Cache(cache.key.at[rows, positions].set(key), cache.value.at[rows, positions].set(value))
        key, value = cache
    scale = config.key_dim**-0.5 * config.rope.softmax_factor
    y = attention(query, key, value, mask, scale)
    return y.reshape(*y.shape[:2], -1), cache


class Attention(nn.Module):
    """Causal grouped-query attention."""

    config: ModelConfig
    lora: LoraConfig

    @nn.compact
    def __call__(self, x, cache, rope, positions, mask):
        """x [B, S, D], the rest as in `attend`; rope: cosines and sines of the positions. Returns (y, cache)."""
        c = self.config

        def heads(name, count, norm=None):
            y = Projection(count * c.head_dim, c.attention_bias, self.lora, name=name)(x)
            if norm and c.qk_norm == "full":
                y = RMSNorm(c.norm_epsilon, name=norm)(y)
            y = y.reshape(*x.shape[:2], count, c.head_dim)
            if norm and c.qk_norm == "head":
                y = RMSNorm(c.norm_epsilon, name=norm)(y)
            return y

        query = rotate(heads("q_proj", c.heads, "q_norm"), rope)
        key = rotate(heads("k_proj", c.kv_heads, "k_norm"), rope)
        y, cache = attend(c, query, key, heads("v_proj", c.kv_heads), cache, positions, mask)
        return Projection(c.width, False, self.lora, name="o_proj")(y), cache


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Keys and values of all heads come from one latent vector a token; positions are carried by a part of the query and
    by one key part that all heads share. The cache holds the expanded keys and values, not the latents.
    """

    config: ModelConfig
    lora: LoraConfig

    @nn.compact
    def __call__(self, x, cache, rope, positions, mask):
        """As `Attention`."""
        c = self.config

        def project(name, inputs, features):
            return Projection(features, False, self.lora, name=name)(inputs)

        def norm(name, inputs):
            return RMSNorm(LATENT_NORM_EPSILON, name=name)(inputs)

        def heads(y):
            return y.reshape(*x.shape[:2], c.heads, -1)

        queries = norm("q_a_norm", project("q_a_proj", x, c.query_rank)) if c.query_rank else x
        query = heads(project("q_b_proj" if c.query_rank else "q_proj", queries, c.heads * c.key_dim))
        query_nope, query_rope = jnp.split(query, [c.nope_dim], axis=-1)
        latent, key_rope = jnp.split(project("kv_a_proj", x, c.latent_rank + c.rope_dim), [c.latent_rank], axis=-1)
        expanded = project("kv_b_proj", norm("kv_a_norm", latent), c.heads * (c.nope_dim + c.value_dim))
        key_nope, value = jnp.split(heads(expanded), [c.nope_dim], axis=-1)
        query_rope = rotate(halves(query_rope), rope)
        key_rope = rotate(halves(key_rope[:, :, None]), rope)
        query = jnp.concatenate([query_nope, query_rope], axis=-1)
        key = jnp.concatenate([key_nope, jnp.broadcast_to(key_rope, query_rope.shape)], axis=-1)
        y, cache = attend(c, query, key, value, cache, positions, mask)
        return project("o_proj", y, c.width), cache


def halves(x: jax.Array) -> jax.Array:
    """Neighbouring pairs of dimensions, as DeepSeek-V2 rotates them, to pairs of the two halves, as `rotate` does."""
    return jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
