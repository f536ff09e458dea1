"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): biased query, key and value, one shared expert behind a gate."""

from flex_jax.models.families.family import COMMON, Family, Key

FAMILY = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    keys=COMMON
    | {
        "head_dim": Key("head_dim", 0),
        "experts": Key("num_experts"),
        "expert_width": Key("moe_intermediate_size"),
        "shared_expert_width": Key("shared_expert_intermediate_size"),
        "norm_topk_prob": Key("norm_topk_prob", False),
        "attention_bias": Key("qkv_bias", True),
    },
    constants={"shared_expert_gate": True},
    only={"use_sliding_window": (False,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],)},
    shared_expert="shared_expert",
)
