"""The mixture-of-experts layer: frozen router and experts, a shared expert, and the personal slot."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flex_jax.models.config import ModelConfig, SlotConfig
from flex_jax.models.linear import MLP, frozen_matrix
from flex_jax.models.slot import PersonalSlot
from flex_jax.ops.experts import ExpertOps, ExpertWeights
from flex_jax.ops.remat import checkpoint_product


class Observation(NamedTuple):
    """What a probe sees of one MoE layer."""

    x: jax.Array  # [B, S, D] input of the layer
    routed: jax.Array  # [B, S, D] its routed output R(x), without shared expert and slot
    router_logits: jax.Array  # [B, S, E] float32
    expert_index: jax.Array  # [B, S, K] int32: the experts of each token
    weights: ExpertWeights  # the layer's frozen experts


Probe = Callable[[Observation, dict], Any]  # (observation, the layer's grafts) -> arrays


def route(logits: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Returns (expert_index [T, K], routing_weight [T, K]): the experts with the largest softmax of logits [T, E].

    Expert groups limit them to the groups with the best single expert (DeepSeek-V2, arXiv 2405.04434, section 2.2.2).
    """
    c, scores = config, jax.nn.softmax(logits.astype(jnp.float32))
    if c.n_group:
        grouped = scores.reshape(len(scores), c.n_group, -1)
        _, best = jax.lax.top_k(grouped.max(-1), c.topk_group)
        allowed = jax.nn.one_hot(best, c.n_group).sum(1)
        scores = (grouped * allowed[..., None]).reshape(scores.shape)
    routing_weight, expert_index = jax.lax.top_k(scores, c.num_experts_per_tok)
    if c.norm_topk_prob:
        routing_weight = routing_weight / routing_weight.sum(-1, keepdims=True)
    return expert_index, routing_weight * c.routed_scaling_factor


class MoE(nn.Module):
    """y = sum of the K routed experts + shared expert + gated personal experts."""

    config: ModelConfig
    slot: SlotConfig
    experts: ExpertOps
    probe: Probe | None

    @nn.compact
    def __call__(self, x: jax.Array, weights: ExpertWeights | None = None) -> tuple[jax.Array, jax.Array, Any]:
        """Maps x [B, S, D] to y [B, S, D], router logits float32 [B, S, E] and the result of the probe or None."""
        c, width, hidden = self.config, self.config.hidden_size, self.config.moe_intermediate_size
        tokens = x.reshape(-1, width)
        router = self.param("router", nn.initializers.lecun_normal(), (width, c.num_experts))
        if weights is None:  # the experts are this module's parameters
            gate_up = frozen_matrix(self, "gate_up", (c.num_experts, width, 2 * hidden))
            down = frozen_matrix(self, "down", (c.num_experts, hidden, width))
            weights = ExpertWeights(*jax.tree.map(lambda leaf: leaf[None], (gate_up, down)))
        logits = checkpoint_product(tokens @ router)
        expert_index, routing_weight = route(logits, c)
        y = routed = self.experts.apply(tokens, weights, expert_index, routing_weight)
        if c.shared_expert_intermediate_size:
            y = y + MLP(c.shared_expert_intermediate_size, c.shared_expert_gate, name="shared_expert")(tokens)
        if self.has_variable("adapters", "slot"):
            y = y + PersonalSlot(self.slot, self.experts, name="slot")(tokens, weights, expert_index, routing_weight)

        def as_sequences(array):
            return array.reshape(*x.shape[:2], -1)

        logits = as_sequences(logits.astype(jnp.float32))
        if self.probe is None:
            return as_sequences(y), logits, None
        seen = Observation(x, as_sequences(routed), logits, as_sequences(expert_index), weights)
        return as_sequences(y), logits, self.probe(seen, self.variables.get("grafts", {}).get("slot", {}))
