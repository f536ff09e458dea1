"""Attention with rotary positions and a key-value cache: grouped-query, and the latent attention of DeepSeek-V2."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flex_jax.models.adapters import AdapterConfig
from flex_jax.models.config import ModelConfig
from flex_jax.models.linear import Projection
from flex_jax.models.norm import RMSNorm
from flex_jax.models.rotary import rotate
from flex_jax.ops.attention import attention

LATENT_NORM_EPSILON = 1e-6  # DeepSeek-V2 does not use the epsilon of config.json here


class Cache(NamedTuple):
    """Keys and values of earlier positions, [B, S, kv heads, size]. Outside the scan they have a leading axis L."""

    key: jax.Array
    value: jax.Array


class Positions(NamedTuple):
    """Where the tokens stand, and which positions they attend to."""

    index: jax.Array  # [B, S] int32
    rope: tuple[jax.Array, jax.Array]  # cosines and sines, see `rotary`
    mask: jax.Array | None  # boolean [B, 1, S or 1, keys]; None is causal


def attend(
    config: ModelConfig, query: jax.Array, key: jax.Array, value: jax.Array, cache: Cache | None, positions: Positions
) -> tuple[jax.Array, Cache | None]:
    """Returns softmax(q k') v as [B, S, H * size], and the new cache.

    query is [B, S, H, size], key and value [B, S, kv heads, size]. With a cache, keys and values are first written into
    it at their positions, and the mask is over cached positions.
    """
    if cache is not None:
        batch, index = jnp.arange(query.shape[0])[:, None], positions.index
        key, value = cache = Cache(cache.key.at[batch, index].set(key), cache.value.at[batch, index].set(value))
    y = attention(query, key, value, positions.mask, config.key_dim**-0.5 * config.rope.softmax_factor)
    return y.reshape(*y.shape[:2], -1), cache


class Attention(nn.Module):
    """Grouped-query attention."""

    config: ModelConfig
    adapters: AdapterConfig

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None, positions: Positions) -> tuple[jax.Array, Cache | None]:
        c = self.config

        def heads(name, count, norm=None):
            y = Projection(count * c.head_dim, c.attention_bias, self.adapters, name=name)(x)
            shape = (*x.shape[:2], count, c.head_dim)
            if norm and c.qk_norm:
                y = RMSNorm(c.rms_norm_eps, name=norm)(y.reshape(shape) if c.qk_norm == "head" else y)
            return y.reshape(shape)

        query = rotate(heads("q_proj", c.num_heads, "q_norm"), positions.rope)
        key = rotate(heads("k_proj", c.num_kv_heads, "k_norm"), positions.rope)
        y, cache = attend(c, query, key, heads("v_proj", c.num_kv_heads), cache, positions)
        return Projection(c.hidden_size, False, self.adapters, name="o_proj")(y), cache


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Keys and values come from one latent vector per token. Only a part of each query, and a part of the key that all
    heads share, is rotated by position. The cache has the full keys and values, not the latents.
    """

    config: ModelConfig
    adapters: AdapterConfig

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None, positions: Positions) -> tuple[jax.Array, Cache | None]:
        c = self.config

        def project(name, inputs, features):
            return Projection(features, False, self.adapters, name=name)(inputs)

        def norm(name, inputs):
            return RMSNorm(LATENT_NORM_EPSILON, name=name)(inputs)

        def heads(y):
            return y.reshape(*x.shape[:2], c.num_heads, -1)

        queries = norm("q_a_norm", project("q_a_proj", x, c.q_lora_rank)) if c.q_lora_rank else x
        query = heads(project("q_b_proj" if c.q_lora_rank else "q_proj", queries, c.num_heads * c.key_dim))
        query_nope, query_rope = jnp.split(query, [c.qk_nope_head_dim], axis=-1)
        latent_and_key = project("kv_a_proj", x, c.kv_lora_rank + c.qk_rope_head_dim)
        latent, key_rope = jnp.split(latent_and_key, [c.kv_lora_rank], axis=-1)
        size = c.num_heads * (c.qk_nope_head_dim + c.value_dim)
        expanded = heads(project("kv_b_proj", norm("kv_a_norm", latent), size))
        key_nope, value = jnp.split(expanded, [c.qk_nope_head_dim], axis=-1)
        query_rope = rotate(_pair_halves(query_rope), positions.rope)
        key_rope = rotate(_pair_halves(key_rope[:, :, None]), positions.rope)
        query = jnp.concatenate([query_nope, query_rope], axis=-1)
        key = jnp.concatenate([key_nope, jnp.broadcast_to(key_rope, query_rope.shape)], axis=-1)
        y, cache = attend(c, query, key, value, cache, positions)
        return project("o_proj", y, c.hidden_size), cache


def _pair_halves(x: jax.Array) -> jax.Array:
    """Reorders dimensions: DeepSeek-V2 rotates neighbouring pairs, `rotate` pairs the two halves."""
    return jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
