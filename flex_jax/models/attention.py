"""Grouped-query attention with rotary positions, a key-value cache and LoRA on its input projections."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flex_jax.models.config import LoraConfig, ModelConfig
from flex_jax.models.lora import lora_delta
from flex_jax.ops.attention import attention


class Cache(NamedTuple):
    """Keys and values of the positions seen so far; [L, B, S, kv heads, head_dim] outside the scan over layers."""

    key: jax.Array
    value: jax.Array


class Projection(nn.Module):
    """A frozen linear map with, where the adapters tree has one, a LoRA beside it: [..., D] -> [..., features]."""

    features: int
    use_bias: bool
    lora: LoraConfig

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        y = x @ kernel
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,))
        if self.has_variable("adapters", "lora_a"):
            y = y + lora_delta(self, self.lora, x)
        return y


def rotary(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of RoPE (arXiv 2104.09864), [B, S, 1, head_dim] float32, for positions [B, S]."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate heads x [B, S, H, head_dim] by their positions, halves paired as Hugging Face does."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    config: ModelConfig
    lora: LoraConfig

    @nn.compact
    def __call__(self, x, cache, rope, positions, mask):
        """x [B, S, D]; positions [B, S]; mask [B, 1, S or 1, keys] boolean, or None for causal. Returns (y, cache).

        Without a cache the keys are those of x. With one, they are written at `positions` of the cache first and every
        cached position up to the query's own is attended to.
        """
        c = self.config

        def project(name, heads):
            features = heads * c.head_dim
            y = Projection(features, c.attention_bias, self.lora, name=name)(x)
            return y.reshape(*x.shape[:2], heads, c.head_dim)

        query = rotate(project("q_proj", c.heads), rope)
        key = rotate(project("k_proj", c.kv_heads), rope)
        value = project("v_proj", c.kv_heads)
        if cache is not None:
            rows = jnp.arange(x.shape[0])[:, None]
            cache = Cache(cache.key.at[rows, positions].set(key), cache.value.at[rows, positions].set(value))
            key, value = cache
        y = attention(query, key, value, mask).reshape(*x.shape[:2], c.heads * c.head_dim)
        y = Projection(c.width, False, self.lora, name="o_proj")(y)
        return y, cache
