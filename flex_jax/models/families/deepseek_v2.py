"""DeepSeek-V2 (and V2-Lite, arXiv 2405.04434): multi-head latent attention, experts chosen within groups."""

from flex_jax.models.families import deepseek
from flex_jax.models.families.family import Family, Key


def read(raw: dict) -> dict:
    """Groups count only where the method of choice is group-limited."""
    grouped = raw.get("topk_method") == "group_limited_greedy"
    if grouped and not all(type(raw[key]) is int for key in ("n_group", "topk_group")):
        raise ValueError(f"n_group {raw['n_group']!r}, topk_group {raw['topk_group']!r} (only integers)")
    groups = {"expert_groups": raw["n_group"], "groups_per_token": raw["topk_group"]} if grouped else {}
    return deepseek.read_shared_experts(raw) | groups


def write(config) -> dict:
    groups = {"topk_method": "greedy"}
    if config.expert_groups:
        groups = {
            "topk_method": "group_limited_greedy",
            "n_group": config.expert_groups,
            "topk_group": config.groups_per_token,
        }
    return deepseek.write_shared_experts(config) | groups | {"q_lora_rank": config.query_rank or None}


FAMILY = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    keys=deepseek.KEYS
    | {
        "routed_scale": Key("routed_scaling_factor", 1.0),
        "latent_rank": Key("kv_lora_rank"),
        "query_rank": Key("q_lora_rank", 0),
        "nope_dim": Key("qk_nope_head_dim"),
        "rope_dim": Key("qk_rope_head_dim"),
        "latent_value_dim": Key("v_head_dim"),
    },
    constants={"norm_topk_prob": False},
    only=deepseek.ONLY
    | {"norm_topk_prob": (False,), "mlp_bias": (False,), "topk_method": ("greedy", "group_limited_greedy")},
    read=read,
    write=write,
    shared_expert="shared_experts",
)
