"""The shared part of the adapters tree, as it starts: LoRA on the projections that make queries, keys and values."""

import jax

from flex_jax.models.attention import adapted_projections
from flex_jax.models.config import LoraConfig, ModelConfig
from flex_jax.models.decoder import layer_stacks
from flex_jax.models.lora import init_lora


def init_attention_lora(key: jax.Array, config: ModelConfig, lora: LoraConfig) -> dict:
    """LoRA pairs [L, D, R], [L, R, F] for every layer, under each stack of layers; their product is zero."""
    projections, stacks = adapted_projections(config), layer_stacks(config)
    places = [(stack, name) for stack in reversed(stacks) for name in projections]
    tree = {stack: {"attention": {}} for stack in stacks}
    for pair_key, (stack, name) in zip(jax.random.split(key, len(places)), places, strict=True):
        tree[stack]["attention"][name] = init_lora(pair_key, lora.rank, (stacks[stack],), *projections[name])
    return tree
