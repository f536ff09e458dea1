"""Fills a client's personal slots and gates from the frozen tree (FLEx, arXiv 2506.00965, step 3)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from flex_jax.models.config import SlotConfig
from flex_jax.models.lora import init_lora
from flex_jax.ops.quantised import dequantise

CLOSED_BIAS = -4.0  # sigmoid 0.018: nearly the pretrained model, but gradients still flow


def fill_slots(frozen: dict, expert_index: jax.Array, slot: SlotConfig, key: jax.Array) -> tuple[dict, dict]:
    """Returns (adapters, grafts) of one client whose layers graft the experts expert_index [L, r].

    Fully trained slots get float32 copies of the experts. Slots that are trained by LoRA get only the pairs: the model
    finds their experts in the frozen tree, by the grafts.
    """
    moe = frozen["layers"]["moe"]
    *_, hidden, width = moe["down"].shape
    sizes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    stack = expert_index.shape

    def gather(stacked, axis):  # the experts of each layer, along the layer's axis `axis`
        of_layer = jax.vmap(partial(jnp.take, axis=axis))
        return dequantise(jax.tree.map(lambda leaf: of_layer(leaf, expert_index), stacked), jnp.float32)

    if slot.training == "full":
        kernels = (*jnp.split(gather(moe["gate_up"], 0), 2, axis=-1), gather(moe["down"], 0))
        tree: dict[str, Any] = {name: {"kernel": kernel} for name, kernel in zip(sizes, kernels, strict=True)}
    else:
        keys = dict(zip(sizes, jax.random.split(key, len(sizes)), strict=True))
        tree = {name: init_lora(keys[name], slot.lora.rank, stack, *size) for name, size in sizes.items()}
    if slot.gate == "sigmoid":
        columns = gather(moe["router"], 1)  # [L, D, r]
        tree["gate"] = columns if slot.gate_init == "router" else jnp.zeros_like(columns)
        if slot.gate_init == "closed":
            tree["gate_bias"] = jnp.full(stack, CLOSED_BIAS)
    grafts = {"expert_index": jnp.asarray(expert_index, jnp.int32)}
    adapters, grafts = ({"layers": {"moe": {"slot": leaves}}} for leaves in (tree, grafts))
    return adapters, grafts
