"""DeepSeek-MoE (16B, arXiv 2401.06066): dense first layers, shared experts without a gate."""

from flex_jax.models.families.family import COMMON, Family, Key

KEYS = COMMON | {
    "experts": Key("n_routed_experts"),
    "expert_width": Key("moe_intermediate_size"),
    "dense_layers": Key("first_k_dense_replace", 0),
    "dense_width": Key("intermediate_size"),
}
ONLY = {"attention_bias": (False,), "moe_layer_freq": (1,), "scoring_func": ("softmax",)}


def read_shared_experts(raw: dict) -> dict:
    """The shared experts are held as one, which is the same function."""
    experts = raw.get("n_shared_experts") or 0
    if type(experts) is not int or not 0 <= experts < 1000:
        raise ValueError(f"n_shared_experts {experts!r} (only an integer of at least 0)")
    return {"shared_expert_width": experts * raw["moe_intermediate_size"]}


def write_shared_experts(config) -> dict:
    return {"n_shared_experts": config.shared_expert_width // config.expert_width}


FAMILY = Family(
    "deepseek",
    "DeepseekForCausalLM",
    keys=KEYS | {"norm_topk_prob": Key("norm_topk_prob", False)},
    only=ONLY,
    read=read_shared_experts,
    write=write_shared_experts,
    shared_expert="shared_experts",
    in_transformers=False,
)
