"""OLMoE (OLMoE-1B-7B, arXiv 2409.02060): queries and keys are normalised over all heads at once."""

from flex_jax.models.families.family import COMMON, Family, Key

FAMILY = Family(
    "olmoe",
    "OlmoeForCausalLM",
    keys=COMMON
    | {
        "experts": Key("num_experts"),
        "expert_width": Key("intermediate_size"),
        "norm_topk_prob": Key("norm_topk_prob", False),
        "norm_epsilon": Key("rms_norm_eps", 1e-5),
    },
    constants={"qk_norm": "full"},
    only={"attention_bias": (False,), "clip_qkv": (None,)},
)
