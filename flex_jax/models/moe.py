"""The mixture-of-experts layer: frozen router and experts, a shared expert, and the personal slot beside them."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flex_jax.models.config import ModelConfig, SlotConfig
from flex_jax.models.linear import MLP, frozen_matrix
from flex_jax.models.slot import PersonalSlot
from flex_jax.ops.experts import Experts, ExpertWeights
from flex_jax.ops.saved import saved


class Observation(NamedTuple):
    """What a probe sees of one MoE layer."""

    x: jax.Array  # [B, S, D] input of the layer
    routed: jax.Array  # [B, S, D] its routed output M(x), without shared expert and slot
    router_logits: jax.Array  # [B, S, E] float32
    index: jax.Array  # [B, S, K] int32 experts that each token went to
    weights: ExpertWeights  # the layer's frozen experts


Probe = Callable[[Observation, dict], object]  # of an observation and the layer's grafts


def route(logits: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Softmax over all E experts, then the K largest: router logits [T, E] -> (index, weight) [T, K].

    With expert groups, the K largest of the groups whose best expert is best (DeepSeek-V2, arXiv 2405.04434, 2.2.2).
    """
    c = config
    scores = jax.nn.softmax(logits.astype(jnp.float32))
    if c.expert_groups:
        grouped = scores.reshape(len(scores), c.expert_groups, -1)
        _, best = jax.lax.top_k(grouped.max(-1), c.groups_per_token)
        allowed = jax.nn.one_hot(best, c.expert_groups).sum(1)
        scores = (grouped * allowed[..., None]).reshape(scores.shape)
    weight, index = jax.lax.top_k(scores, c.experts_per_token)
    if c.norm_topk_prob:
        weight = weight / weight.sum(-1, keepdims=True)
    return index, weight * c.routed_scale


class MoE(nn.Module):
    """y = sum of the K routed experts + shared expert + gated personal experts."""

    config: ModelConfig
    slot: SlotConfig
    experts: Experts
    probe: Probe | None

    @nn.compact
    def __call__(self, x: jax.Array, weights: ExpertWeights | None = None):
        """x [B, S, D] -> (y [B, S, D], router logits [B, S, E] float32, what the probe returned or None). weights: the
        experts; where they are not given, the layer's own parameters."""
        c = self.config
        tokens = x.reshape(-1, c.width)
        router = self.param("router", nn.initializers.lecun_normal(), (c.width, c.experts))
        if weights is None:
            gate_up = frozen_matrix(self, "gate_up", (c.experts, c.width, 2 * c.expert_width))
            down = frozen_matrix(self, "down", (c.experts, c.expert_width, c.width))
            weights = ExpertWeights(*jax.tree.map(lambda leaf: leaf[None], (gate_up, down)))
        logits = saved(tokens @ router)
        index, weight = route(logits, c)
        y = routed = self.experts.apply(tokens, weights, index, weight)
        if c.shared_expert_width:
            y = y + MLP(c.shared_expert_width, c.shared_expert_gate, name="shared_expert")(tokens)
        if self.has_variable("adapters", "slot"):
            y = y + PersonalSlot(self.slot, self.experts, name="slot")(tokens, weights, index, weight)

        def as_sequences(rows):
            return rows.reshape(*x.shape[:2], -1)

        logits = as_sequences(logits.astype(jnp.float32))
        probed = None
        if self.probe is not None:
            grafts = self.variables.get("grafts", {}).get("slot", {})
            seen = Observation(x, as_sequences(routed), logits, as_sequences(index), weights)
            probed = self.probe(seen, grafts)
        return as_sequences(y), logits, probed
