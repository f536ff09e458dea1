"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): biased query, key and value; one shared expert behind a gate."""

from flex_jax.models.families.family import FALSE, ZERO, Family, Key

SUPPORTED = {"use_sliding_window": (False,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],)}
FAMILY = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    keys={
        "head_dim": ZERO,
        "shared_expert_intermediate_size": Key(),
        "norm_topk_prob": FALSE,
        "attention_bias": Key("qkv_bias", True),
    },
    constants={"shared_expert_gate": True},
    supported=SUPPORTED,
    shared_expert="shared_expert",
)
