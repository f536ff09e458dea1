"""OLMoE (OLMoE-1B-7B, arXiv 2409.02060): queries and keys are normalised over all heads at once."""

from flex_jax.models.families.family import FALSE, Family, Key

FAMILY = Family(
    "olmoe",
    "OlmoeForCausalLM",
    keys={
        "moe_intermediate_size": Key("intermediate_size"),
        "norm_topk_prob": FALSE,
        "rms_norm_eps": Key(default=1e-5),
    },
    constants={"qk_norm": "full"},
    supported={"attention_bias": (False,), "clip_qkv": (None,)},
)
