"""How well kept experts alone reconstruct a layer's routed output (FLEx step 2; Lu et al. 2024, arXiv 2402.14800)."""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flex_jax.models.decoder import Decoder
from flex_jax.models.moe import Observation
from flex_jax.ops.experts import swiglu
from flex_jax.ops.grouped import of_layer
from flex_jax.ops.quantised import dequantise


def squared_errors(seen: Observation, grafts: dict) -> jax.Array:
    """Probe: ||M_{kept + e}(x) - M(x)||^2 per token for each candidate e, [B, S, E] float32.

    M(x) is the layer's routed output. With nothing kept yet M_e is expert e alone, its routing weight 1. Beside kept
    experts the router's softmax is restricted to them and e: M_{kept + e} = w E_e + (1 - w) M_kept, with
    w = sigmoid(logit_e - logsumexp(logits_kept)). One expert at a time, so that memory does not grow with E.
    """
    target = seen.routed.astype(jnp.float32)
    gate_up, down, layer = seen.weights
    every = of_layer(gate_up, layer), of_layer(down, layer)  # as held, and dequantised one at a time

    def output(expert):
        gate_up, down = (dequantise(matrix, seen.x.dtype) for matrix in expert)
        return (swiglu(seen.x @ gate_up) @ down).astype(jnp.float32)

    kept = grafts.get("expert_index")  # [j] int32
    if kept is not None:
        logits = seen.router_logits[..., kept]
        share = jax.nn.softmax(logits)
        experts = [jax.tree.map(lambda leaf, j=j: leaf[kept[j]], every) for j in range(kept.shape[0])]
        outputs = [output(expert) for expert in experts]
        kept_output = sum(share[..., j, None] * out for j, out in enumerate(outputs))
        rivals = jax.nn.logsumexp(logits, axis=-1)

    def candidate(expert):
        weights, logit = expert
        out = output(weights)
        if kept is not None:
            weight = jax.nn.sigmoid(logit - rivals)[..., None]
            out = weight * out + (1.0 - weight) * kept_output
        return jnp.square(out - target).sum(-1)

    return jnp.moveaxis(lax.map(candidate, (every, jnp.moveaxis(seen.router_logits, -1, 0))), 0, -1)


def routed_counts(seen: Observation, grafts: dict) -> jax.Array:
    """Probe: whether the router sent the token to the expert, [B, S, E] float32."""
    return jax.nn.one_hot(seen.index, seen.router_logits.shape[-1]).sum(-2)


def probe_tokens(model: Decoder, probe, frozen: dict, tokens, attention_mask, kept=None) -> jax.Array:
    """What `probe` says of every token, [L, B, S, E], zero at padding. tokens, attention_mask [B, S]; kept [L, j]."""
    variables = {"params": frozen}
    if kept is not None:
        variables["grafts"] = {"layers": {"moe": {"slot": {"expert_index": kept}}}}
    features = model.clone(probe=probe).apply(variables, tokens, attention_mask, method=Decoder.features)
    return features.probed * attention_mask[:, :, None]


@partial(jax.jit, static_argnums=0)
def batch_losses(model: Decoder, frozen: dict, tokens, attention_mask, kept=None) -> jax.Array:
    """Sum over the sequences of one batch [B, S] of || M_{kept + e}(X) - M(X) ||_F, [L, E] float32."""
    errors = probe_tokens(model, squared_errors, frozen, tokens, attention_mask, kept)
    return jnp.sqrt(errors.sum(2)).sum(1)


def reconstruction_losses(model: Decoder, frozen: dict, batches: Iterable) -> np.ndarray:
    """sum over sequences of || E_e(X) - M(X) ||_F for every layer and expert, [L, E] float64.

    X is the input of the MoE layer in the unpruned model and M(X) its routed output, both over the real positions of
    one sequence. batches: (input_ids [B, S], attention_mask [B, S]) pairs, streamed: memory does not depend on their
    number.
    """
    total = np.zeros((model.config.moe_layers, model.config.experts))
    for tokens, attention_mask in batches:
        total += np.asarray(batch_losses(model, frozen, jnp.asarray(tokens), jnp.asarray(attention_mask)), np.float64)
    return total
