"""Tree surgery: fill a client's personal slots and gates from the frozen tree (FLEx step 3)."""

from functools import partial

import jax
import jax.numpy as jnp

from flex_jax.models.config import SlotConfig
from flex_jax.models.lora import init_lora
from flex_jax.ops.quantised import dequantise

CLOSED_BIAS = -4.0  # sigmoid 0.018: nearly the pretrained model, and still some gradient


def fill_slots(frozen: dict, chosen: jax.Array, slot: SlotConfig, key: jax.Array) -> tuple[dict, dict]:
    """(adapters, grafts) of one client whose layer l grafts the experts chosen[l], chosen [L, r] int32.

    A slot trained in full holds float32 copies of the experts; one trained by LoRA holds the pairs only, and its model
    reads the experts from the frozen tree by the grafts. A trained gate starts as the experts' router rows, or closed.
    """
    layers, _ = chosen.shape
    moe = frozen["layers"]["moe"]
    width = moe["down"].shape[2]
    inputs, stack = moe["gate_up"].shape[2], chosen.shape

    def take(stacked, axis):  # the chosen experts of each layer, along the layer's own `axis`
        rows = jax.vmap(partial(jnp.take, axis=axis))
        return dequantise(jax.tree.map(lambda leaf: rows(leaf, chosen), stacked), jnp.float32)

    if slot.training == "full":
        gate_up = take(moe["gate_up"], 0)
        tree = {
            "gate_proj": {"kernel": gate_up[..., :width]},
            "up_proj": {"kernel": gate_up[..., width:]},
            "down_proj": {"kernel": take(moe["down"], 0)},
        }
    else:
        sizes = {"gate_proj": (inputs, width), "up_proj": (inputs, width), "down_proj": (width, inputs)}
        keys = jax.random.split(key, len(sizes))
        tree = {
            name: init_lora(name_key, slot.lora.rank, stack, *size)
            for name_key, (name, size) in zip(keys, sizes.items(), strict=True)
        }
    if slot.gate == "sigmoid":
        rows = take(moe["router"], 1)  # [L, D, r]
        tree["gate"] = rows if slot.gate_init == "router" else jnp.zeros_like(rows)
        if slot.gate_init == "closed":
            tree["gate_bias"] = jnp.full(stack, CLOSED_BIAS)
    grafts = {"expert_index": jnp.asarray(chosen, jnp.int32)}
    return tuple({"layers": {"moe": {"slot": leaves}}} for leaves in (tree, grafts))
