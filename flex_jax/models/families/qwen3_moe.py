"""Qwen3-MoE (Qwen3-30B-A3B): queries and keys are normalised head by head; no shared expert."""

from flex_jax.models.families.family import COMMON, Family, Key

FAMILY = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    keys=COMMON
    | {
        "head_dim": Key("head_dim", 0),
        "experts": Key("num_experts", alias="num_local_experts"),
        "expert_width": Key("moe_intermediate_size"),
        "norm_topk_prob": Key("norm_topk_prob", False),
    },
    constants={"qk_norm": "head"},
    only={
        "attention_bias": (False,),
        "use_sliding_window": (False,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([],),
    },
)
