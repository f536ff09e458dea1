"""The personal slot of an MoE layer: grafted experts and the sigmoid gate that lets them speak (FLEx, step 3)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flex_jax.models.config import SlotConfig
from flex_jax.models.lora import lora_delta
from flex_jax.ops.experts import Experts, ExpertWeights, swiglu
from flex_jax.ops.quantised import dequantise
from flex_jax.ops.saved import saved


class SlotProjection(nn.Module):
    """One projection of the slot's r experts: trained in full (`kernel`), or a LoRA on grafted frozen weights."""

    slot: SlotConfig

    @nn.compact
    def __call__(self, x, frozen):
        """x [r, T, D] -> [r, T, F]; `frozen()` gives the grafted weights [r, D, F] where the slot has none."""
        if self.has_variable("adapters", "kernel"):
            return saved(jnp.einsum("rtd,rdf->rtf", x, self.get_variable("adapters", "kernel").astype(x.dtype)))
        return saved(jnp.einsum("rtd,rdf->rtf", x, frozen()) + lora_delta(self, self.slot.lora, x))


class PersonalSlot(nn.Module):
    """sum_j sigmoid(g_j . x) P_j(x): what the grafted experts add to the frozen layer's output.

    Without a gate the sigmoid is 1. Under "routing" it is sum_j w_j(x) (P_j(x) - E_j(x)): the layer's output as if the
    router, whose weight w_j is 0 for a token that it sends elsewhere, chose P_j in the place of E_j.
    """

    slot: SlotConfig
    experts: Experts = Experts()

    @nn.compact
    def __call__(self, x: jax.Array, weights: ExpertWeights, index: jax.Array, weight: jax.Array) -> jax.Array:
        """x [T, D], weights the layer's frozen experts, index and weight [T, K] of its router. Returns [T, D].

        A trained gate has a bias only where it starts closed. With LoRA on the experts their base weights are rows
        `expert_index` [r] of the frozen ones, read and not kept.
        """
        width = weights.down.shape[2]
        chosen = self.get_variable("grafts", "expert_index")
        each = jnp.broadcast_to(x, (*chosen.shape, *x.shape))

        def grafted(stack):
            return dequantise(self.experts.take(stack, weights.layer, chosen), x.dtype)

        def project(name, rows, frozen):
            return SlotProjection(self.slot, name=name)(rows, frozen)

        gated = jax.nn.silu(project("gate_proj", each, lambda: grafted(weights.gate_up)[..., :width]))
        hidden = gated * project("up_proj", each, lambda: grafted(weights.gate_up)[..., width:])
        outputs = project("down_proj", hidden, lambda: grafted(weights.down))
        if self.slot.gate == "none":
            return outputs.sum(0)
        if self.slot.gate == "routing":
            frozen = jax.vmap(lambda gate_up, down: swiglu(x @ gate_up) @ down)
            outputs = outputs - frozen(grafted(weights.gate_up), grafted(weights.down))
            share = jnp.einsum("tkr,tk->tr", index[..., None] == chosen, weight).astype(x.dtype)
            return jnp.einsum("rtd,tr->td", outputs, share)
        gate = x @ self.get_variable("adapters", "gate").astype(x.dtype)  # [T, r]
        if self.has_variable("adapters", "gate_bias"):
            gate = gate + self.get_variable("adapters", "gate_bias").astype(x.dtype)
        return jnp.einsum("rtd,tr->td", outputs, jax.nn.sigmoid(gate))
