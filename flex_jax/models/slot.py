"""The personal slot of an MoE layer: grafted experts behind a sigmoid gate (FLEx, arXiv 2506.00965, step 3)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from flex_jax.models.config import SlotConfig
from flex_jax.models.lora import dropout_of, lora_delta
from flex_jax.ops.experts import ExpertOps, ExpertWeights, swiglu
from flex_jax.ops.quantised import dequantise
from flex_jax.ops.remat import checkpoint_product


class SlotProjection(nn.Module):
    """One projection of the slot's r experts: fully trained (`kernel`), or a LoRA on grafted frozen weights."""

    slot: SlotConfig

    @nn.compact
    def __call__(self, x, frozen):
        """Maps x [r, T, D] to [r, T, F]. `frozen()` returns the grafted weights [r, D, F], if there is no kernel."""
        leaves, lora = self.variables["adapters"], self.slot.lora
        y = jnp.einsum("rtd,rdf->rtf", x, leaves["kernel"].astype(x.dtype) if "kernel" in leaves else frozen())
        if "kernel" not in leaves:
            y = y + lora_delta(leaves, lora, x, dropout_of(self, lora))
        return checkpoint_product(y)


class PersonalSlot(nn.Module):
    """sum_j sigmoid(g_j . x) P_j(x): what the grafted experts add to the frozen layer's output.

    Without a gate, 1 replaces the sigmoid. With the gate "routing" the output is sum_j w_j(x) (P_j(x) - E_j(x)), as if
    P_j replaced E_j in the layer. The routing weight w_j is 0 for a token whose experts do not include E_j.
    """

    slot: SlotConfig
    experts: ExpertOps = ExpertOps()

    @nn.compact
    def __call__(self, x: Array, weights: ExpertWeights, expert_index: Array, routing_weight: Array) -> Array:
        """Maps x [T, D] to [T, D], given the layer's frozen experts and its router's choice [T, K]."""
        hidden_size = weights.down.shape[2]
        grafted_index = self.get_variable("grafts", "expert_index")  # [r]
        copies = jnp.broadcast_to(x, (*grafted_index.shape, *x.shape))

        def grafted(stack):
            return dequantise(self.experts.gather(stack, weights.layer, grafted_index), x.dtype)

        def project(name, inputs, frozen):
            return SlotProjection(self.slot, name=name)(inputs, frozen)

        gated = jax.nn.silu(project("gate_proj", copies, lambda: grafted(weights.gate_up)[..., :hidden_size]))
        hidden = gated * project("up_proj", copies, lambda: grafted(weights.gate_up)[..., hidden_size:])
        outputs = project("down_proj", hidden, lambda: grafted(weights.down))
        if self.slot.gate == "none":
            return outputs.sum(0)
        if self.slot.gate == "routing":
            frozen = jax.vmap(lambda gate_up, down: swiglu(x @ gate_up) @ down)
            outputs = outputs - frozen(grafted(weights.gate_up), grafted(weights.down))
            share = jnp.einsum("tkr,tk->tr", expert_index[..., None] == grafted_index, routing_weight).astype(x.dtype)
            return jnp.einsum("rtd,tr->td", outputs, share)
        gate = x @ self.get_variable("adapters", "gate").astype(x.dtype)  # [T, r]
        if self.has_variable("adapters", "gate_bias"):  # only if the gate starts closed
            gate = gate + self.get_variable("adapters", "gate_bias").astype(x.dtype)
        return jnp.einsum("rtd,tr->td", outputs, jax.nn.sigmoid(gate))
