"""Qwen3-MoE (Qwen3-30B-A3B): queries and keys are normalised head by head; no shared expert."""

from flex_jax.models.families import qwen2_moe
from flex_jax.models.families.family import FALSE, ZERO, Family

FAMILY = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    keys={"head_dim": ZERO, "norm_topk_prob": FALSE},
    constants={"qk_norm": "head"},
    supported=qwen2_moe.SUPPORTED | {"attention_bias": (False,)},
)
