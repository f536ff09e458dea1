"""DeepSeek-MoE (16B, arXiv 2401.06066): dense first layers, shared experts without a gate."""

from flex_jax.models.config import ModelConfig
from flex_jax.models.families.family import FALSE, ZERO, Family, Key

KEYS = {"num_experts": Key("n_routed_experts"), "first_k_dense_replace": ZERO, "intermediate_size": Key()}
SUPPORTED = {"attention_bias": (False,), "moe_layer_freq": (1,), "scoring_func": ("softmax",)}


def read_shared_experts(raw: dict) -> dict:
    """Reads the shared experts as one wide expert, which computes the same function."""
    count = raw.get("n_shared_experts") or 0
    if type(count) is not int or not 0 <= count < 1000:
        raise ValueError(f"n_shared_experts {count!r} (only an integer of at least 0)")
    return {"shared_expert_intermediate_size": count * raw["moe_intermediate_size"]}


def write_shared_experts(config: ModelConfig) -> dict:
    return {"n_shared_experts": config.shared_expert_intermediate_size // config.moe_intermediate_size}


FAMILY = Family(
    "deepseek",
    "DeepseekForCausalLM",
    keys=KEYS | {"norm_topk_prob": FALSE},
    supported=SUPPORTED,
    read=read_shared_experts,
    write=write_shared_experts,
    shared_expert="shared_experts",
    in_transformers=False,
)
