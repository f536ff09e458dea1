"""The mixture-of-experts layer: frozen router and experts, the shared expert, and the personal slot beside them."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flex_jax.models.config import ModelConfig, SlotConfig
from flex_jax.models.slot import PersonalSlot
from flex_jax.ops.experts import ExpertWeights, swiglu


class Observation(NamedTuple):
    """What a probe sees of one MoE layer."""

    x: jax.Array  # [B, S, D] input of the layer
    routed: jax.Array  # [B, S, D] its routed output M(x), without shared expert and slot
    router_logits: jax.Array  # [B, S, E] float32
    index: jax.Array  # [B, S, K] int32 experts that each token went to
    weights: ExpertWeights  # the layer's frozen experts


Probe = Callable[[Observation, dict], object]  # of an observation and the layer's grafts


def route(logits: jax.Array, experts_per_token: int, norm_topk_prob: bool) -> tuple[jax.Array, jax.Array]:
    """Softmax over all E experts, then the K largest: router logits [T, E] -> (index, weight) [T, K]."""
    weight, index = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), experts_per_token)
    if norm_topk_prob:
        weight = weight / weight.sum(-1, keepdims=True)
    return index, weight


class SharedExpert(nn.Module):
    """A SwiGLU expert that sees every token, behind a sigmoid gate of its own (Qwen2-MoE)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        width, hidden = self.config.width, self.config.shared_expert_width
        init = nn.initializers.lecun_normal()
        y = swiglu(x @ self.param("gate_up", init, (width, 2 * hidden))) @ self.param("down", init, (hidden, width))
        return jax.nn.sigmoid(x @ self.param("gate", init, (width, 1))) * y


class MoE(nn.Module):
    """y = sum of the K routed experts + gated shared expert + gated personal experts."""

    config: ModelConfig
    slot: SlotConfig
    experts: Callable
    probe: Probe | None

    @nn.compact
    def __call__(self, x: jax.Array):
        """x [B, S, D] -> (y [B, S, D], router logits [B, S, E] float32, what the probe returned or None)."""
        c = self.config
        tokens = x.reshape(-1, c.width)
        stacked = nn.initializers.lecun_normal(batch_axis=(0,))
        router = self.param("router", nn.initializers.lecun_normal(), (c.width, c.experts))
        weights = ExpertWeights(
            self.param("gate_up", stacked, (c.experts, c.width, 2 * c.expert_width)),
            self.param("down", stacked, (c.experts, c.expert_width, c.width)),
        )
        logits = tokens @ router
        index, weight = route(logits, c.experts_per_token, c.norm_topk_prob)
        routed = self.experts(tokens, weights, index, weight)
        y = routed + SharedExpert(c, name="shared_expert")(tokens)
        if self.has_variable("adapters", "slot"):
            y = y + PersonalSlot(self.slot, name="slot")(tokens, weights)

        def as_sequences(rows):
            return rows.reshape(*x.shape[:2], -1)

        logits = as_sequences(logits.astype(jnp.float32))
        probed = None
        if self.probe is not None:
            grafts = self.variables.get("grafts", {}).get("slot", {})
            seen = Observation(x, as_sequences(routed), logits, as_sequences(index), weights)
            probed = self.probe(seen, grafts)
        return as_sequences(y), logits, probed
