"""The shared part of the adapters tree, as it starts: LoRA on the query, key and value projections."""

import jax

from flex_jax.models.config import LoraConfig, ModelConfig
from flex_jax.models.lora import init_lora


def init_attention_lora(key: jax.Array, config: ModelConfig, lora: LoraConfig) -> dict:
    """LoRA pairs [L, D, R], [L, R, F] for q, k and v of every layer; their product is zero."""
    outputs = {
        "q_proj": config.heads * config.head_dim,
        "k_proj": config.kv_heads * config.head_dim,
        "v_proj": config.kv_heads * config.head_dim,
    }
    keys = jax.random.split(key, len(outputs))
    pairs = {
        name: init_lora(name_key, lora.rank, (config.layers,), config.width, size)
        for name_key, (name, size) in zip(keys, outputs.items(), strict=True)
    }
    return {"layers": {"attention": pairs}}
