"""How well a few experts reconstruct a layer's routed output (FLEx step 2; Lu et al. 2024, arXiv 2402.14800)."""

from collections.abc import Iterable
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flex_jax.models.decoder import Decoder, Features
from flex_jax.models.moe import Observation, Probe
from flex_jax.ops.experts import swiglu
from flex_jax.ops.grouped import layer_slice
from flex_jax.ops.quantised import dequantise


def squared_errors(seen: Observation, grafts: dict) -> jax.Array:
    """Probe: returns ||R_{selected + e}(x) - R(x)||^2 per token for each candidate e, [B, S, E] float32.

    R(x) is the layer's routed output. The router's softmax is restricted to e and the selected experts: R_{selected +
    e} = w E_e + (1 - w) M_selected, with w = sigmoid(logit_e - logsumexp(logits_selected)), or 1 if none is selected.
    Candidates are computed one at a time, so that memory does not grow with E.
    """
    target, (gate_up, down, layer) = seen.routed.astype(jnp.float32), seen.weights
    experts = layer_slice(gate_up, layer), layer_slice(down, layer)  # quantised ones are dequantised one at a time

    def output(expert):
        gate_up, down = (dequantise(matrix, seen.x.dtype) for matrix in expert)
        return (swiglu(seen.x @ gate_up) @ down).astype(jnp.float32)

    selected = grafts.get("expert_index", jnp.zeros(0, jnp.int32))  # [j]
    logits = seen.router_logits[..., selected]
    share, selected_logit = jax.nn.softmax(logits), jax.nn.logsumexp(logits, axis=-1)  # -inf if nothing is selected
    selected_output = jnp.zeros_like(target)
    for j in range(selected.shape[0]):
        expert = jax.tree.map(lambda leaf, j=j: leaf[selected[j]], experts)
        selected_output += share[..., j, None] * output(expert)

    def candidate(inputs):
        expert, logit = inputs
        weight = jax.nn.sigmoid(logit - selected_logit)[..., None]
        return jnp.square(weight * output(expert) + (1.0 - weight) * selected_output - target).sum(-1)

    return jnp.moveaxis(lax.map(candidate, (experts, jnp.moveaxis(seen.router_logits, -1, 0))), 0, -1)


def routed_counts(seen: Observation, grafts: dict) -> jax.Array:
    """Probe: returns 1 for each expert that the router sent the token to, else 0: [B, S, E] float32."""
    return jax.nn.one_hot(seen.expert_index, seen.router_logits.shape[-1]).sum(-2)


def probe_tokens(model: Decoder, probe: Probe, frozen: dict, tokens, attention_mask, selected=None) -> jax.Array:
    """Returns a probe's result [L, B, S, E], zero at padding. It gets the experts `selected` [L, j] as grafts."""
    variables = {"params": frozen}
    if selected is not None:
        variables["grafts"] = {"layers": {"moe": {"slot": {"expert_index": selected}}}}
    features = model.clone(probe=probe).apply(variables, tokens, attention_mask, method=Decoder.features)
    return cast(Features, features).probed * attention_mask[:, :, None]


@partial(jax.jit, static_argnums=0)
def batch_losses(model: Decoder, frozen: dict, tokens, attention_mask, selected=None) -> jax.Array:
    """Returns the sum over sequences of one batch [B, S] of || R_{selected + e}(X) - R(X) ||_F, [L, E] float32."""
    errors = probe_tokens(model, squared_errors, frozen, tokens, attention_mask, selected)
    return jnp.sqrt(errors.sum(2)).sum(1)


def reconstruction_losses(model: Decoder, frozen: dict, batches: Iterable) -> np.ndarray:
    """Returns the sum over sequences of || E_e(X) - R(X) ||_F for every layer and expert, [L, E] float64.

    X is the input of the MoE layer in the unchanged model, and R(X) its routed output, both over the real positions of
    one sequence. Batches are a stream of pairs (input_ids [B, S], attention_mask [B, S]).
    """
    total = np.zeros((model.config.num_moe_layers, model.config.num_experts))
    for tokens, attention_mask in batches:
        total += np.asarray(batch_losses(model, frozen, jnp.asarray(tokens), jnp.asarray(attention_mask)), np.float64)
    return total
