"""The decoder: embedding, L layers of attention and mixture-of-experts under one scan, final norm, head."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flex_jax.models.attention import Attention, Cache, rotary
from flex_jax.models.config import AdapterConfig, ModelConfig
from flex_jax.models.lora import DROPOUT
from flex_jax.models.moe import MoE, Probe
from flex_jax.ops.experts import frozen_experts


class Output(NamedTuple):
    logits: jax.Array  # [B, S, V] float32
    router_logits: jax.Array | None  # [L, B, S, E] float32, when asked for
    cache: Cache | None  # when one was given


class Features(NamedTuple):
    """Everything before the head."""

    hidden: jax.Array  # [B, S, D] after the final norm
    router_logits: jax.Array  # [L, B, S, E] float32
    cache: Cache | None
    probed: Any  # what the probe returned, stacked over layers


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.epsilon)
        return scale * normed.astype(x.dtype)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + moe(norm(x)); shaped as the body of a scan over layers."""

    config: ModelConfig
    adapters: AdapterConfig
    experts: Callable
    probe: Probe | None

    @nn.compact
    def __call__(self, x, cache, rope, positions, mask):
        c = self.config
        normed = RMSNorm(c.norm_epsilon, name="attention_norm")(x)
        y, cache = Attention(c, self.adapters.lora, name="attention")(normed, cache, rope, positions, mask)
        x = x + y
        normed = RMSNorm(c.norm_epsilon, name="moe_norm")(x)
        y, router_logits, probed = MoE(c, self.adapters.slot, self.experts, self.probe, name="moe")(normed)
        return x + y, (cache, router_logits, probed)


class Decoder(nn.Module):
    """A mixture-of-experts language model, a pure function of its collections:

    `params` the frozen backbone; `adapters` what is trained (LoRA, personal slots), absent or empty for the pretrained
    model; `grafts` the int32 indices of the experts that the slots came from. LoRA dropout is active where the random
    stream "dropout" is given. With `remat` a backward pass computes each layer again from its input.
    """

    config: ModelConfig
    adapters: AdapterConfig = AdapterConfig()
    experts: Callable = frozen_experts
    probe: Probe | None = None
    remat: bool = True

    def setup(self):
        c = self.config
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), (c.vocab_size, c.width))
        if not c.tied_head:
            self.head = self.param("head", nn.initializers.normal(0.02), (c.vocab_size, c.width))
        self.layers = nn.scan(
            nn.remat(Layer, prevent_cse=False) if self.remat else Layer,
            variable_axes={"params": 0, "adapters": 0, "grafts": 0},
            split_rngs={"params": True, DROPOUT: True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.layers,
        )(c, self.adapters, self.experts, self.probe)
        self.norm = RMSNorm(c.norm_epsilon)

    def features(self, tokens, attention_mask=None, *, positions=None, cache=None) -> Features:
        """Hidden states of tokens [B, S] int32, whose attention_mask [B, S] is 0 at padding or None.

        With a `cache` (see `init_cache`) the tokens stand at `positions` [B, S] and attend to all cached positions up
        to their own.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        mask = None
        if cache is not None:
            mask = (jnp.arange(cache.key.shape[2]) <= positions[..., None])[:, None]
        elif attention_mask is not None:
            causal = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))
            mask = (attention_mask != 0)[:, None, None, :] & causal
        rope = rotary(positions, self.config.head_dim, self.config.rope_theta)
        x, (cache, router_logits, probed) = self.layers(self.embedding[tokens], cache, rope, positions, mask)
        return Features(self.norm(x), router_logits, cache, probed)

    def __call__(
        self, tokens, attention_mask=None, *, positions=None, cache=None, output_router_logits=False
    ) -> Output:
        """Logits of tokens [B, S] int32; arguments as those of `features`."""
        features = self.features(tokens, attention_mask, positions=positions, cache=cache)
        head = self.embedding if self.config.tied_head else self.head
        logits = jnp.einsum("bsd,vd->bsv", features.hidden, head, preferred_element_type=jnp.float32)
        return Output(logits, features.router_logits if output_router_logits else None, features.cache)


def head_weights(model: Decoder, frozen: dict) -> jax.Array:
    """The head [V, D], which is the embedding where the two are tied."""
    return frozen["embedding" if model.config.tied_head else "head"]


def init_cache(config: ModelConfig, batch: int, length: int, dtype) -> Cache:
    """An empty cache for sequences of up to `length` tokens."""
    shape = (config.layers, batch, length, config.kv_heads, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
