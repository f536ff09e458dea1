"""Qwen2-MoE (Qwen1.5-MoE-A2.7B): attention with bias, K routed experts, one gated shared expert."""

from flex_jax.models.config import ModelConfig
from flex_jax.models.tensors import Tensor

LAYER = "model.layers.{layer}."


def read_config(raw: dict) -> tuple[ModelConfig, list[str]]:
    """The ModelConfig of a config.json, and what in it is not supported (empty if nothing)."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    unsupported = [
        f"{key} {raw[key]!r} (only {allowed!r})"
        for key, allowed in (
            ("hidden_act", "silu"),
            ("use_sliding_window", False),
            ("decoder_sparse_step", 1),
            ("mlp_only_layers", []),
        )
        if (raw.get(key) or allowed) != allowed
    ]
    unsupported += [f"rope scaling {kind!r} (only 'default')"] if kind != "default" else []
    unsupported += ["quantization_config"] if raw.get("quantization_config") else []
    config = ModelConfig(
        family="qwen2_moe",
        vocab_size=raw["vocab_size"],
        width=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=raw["num_attention_heads"],
        kv_heads=raw["num_key_value_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        experts=raw["num_experts"],
        experts_per_token=raw["num_experts_per_tok"],
        expert_width=raw["moe_intermediate_size"],
        shared_expert_width=raw["shared_expert_intermediate_size"],
        norm_topk_prob=raw.get("norm_topk_prob", False),
        attention_bias=raw.get("qkv_bias", True),
        tied_head=raw.get("tie_word_embeddings", False),
        norm_epsilon=raw.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
    )
    return config, unsupported


def write_config(config: ModelConfig) -> dict:
    """The config.json of a ModelConfig: `read_config(write_config(c))` gives c back."""
    return {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "num_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.expert_width,
        "shared_expert_intermediate_size": config.shared_expert_width,
        "intermediate_size": config.shared_expert_width,
        "norm_topk_prob": config.norm_topk_prob,
        "qkv_bias": config.attention_bias,
        "tie_word_embeddings": config.tied_head,
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    }


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor of a checkpoint and where it goes."""
    c = config
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    attention, mlp = LAYER + "self_attn.", LAYER + "mlp."
    expert = mlp + "experts.{expert}."
    table = [
        Tensor("embedding", ["model.embed_tokens.weight"], (c.vocab_size, c.width)),
        Tensor("norm/scale", ["model.norm.weight"], (c.width,)),
        Tensor("layers/attention_norm/scale", [LAYER + "input_layernorm.weight"], (c.width,)),
        Tensor("layers/moe_norm/scale", [LAYER + "post_attention_layernorm.weight"], (c.width,)),
        Tensor("layers/attention/q_proj/kernel", [attention + "q_proj.weight"], (queries, c.width), True),
        Tensor("layers/attention/k_proj/kernel", [attention + "k_proj.weight"], (keys, c.width), True),
        Tensor("layers/attention/v_proj/kernel", [attention + "v_proj.weight"], (keys, c.width), True),
        Tensor("layers/attention/o_proj/kernel", [attention + "o_proj.weight"], (c.width, queries), True),
        Tensor("layers/moe/router", [mlp + "gate.weight"], (c.experts, c.width), True),
        Tensor(
            "layers/moe/gate_up",
            [expert + "gate_proj.weight", expert + "up_proj.weight"],
            (c.expert_width, c.width),
            True,
        ),
        Tensor("layers/moe/down", [expert + "down_proj.weight"], (c.width, c.expert_width), True),
        Tensor(
            "layers/moe/shared_expert/gate_up",
            [mlp + "shared_expert.gate_proj.weight", mlp + "shared_expert.up_proj.weight"],
            (c.shared_expert_width, c.width),
            True,
        ),
        Tensor(
            "layers/moe/shared_expert/down",
            [mlp + "shared_expert.down_proj.weight"],
            (c.width, c.shared_expert_width),
            True,
        ),
        Tensor("layers/moe/shared_expert/gate", [mlp + "shared_expert_gate.weight"], (1, c.width), True),
    ]
    if c.attention_bias:
        for name, size in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            table.append(Tensor(f"layers/attention/{name}/bias", [attention + name + ".bias"], (size,)))
    if not c.tied_head:
        table.append(Tensor("head", ["lm_head.weight"], (c.vocab_size, c.width)))
    return table
