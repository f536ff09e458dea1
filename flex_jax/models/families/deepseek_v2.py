"""DeepSeek-V2 (and V2-Lite, arXiv 2405.04434): multi-head latent attention, experts chosen within groups."""

from flex_jax.models.config import ModelConfig
from flex_jax.models.families import deepseek
from flex_jax.models.families.family import ZERO, Family, Key

LATENT = dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), Key())


def read(raw: dict) -> dict:
    """Reads shared experts and expert groups. Groups count only if the choice of experts is group-limited."""
    grouped = raw.get("topk_method") == "group_limited_greedy"
    groups = {key: raw[key] for key in ("n_group", "topk_group")} if grouped else {}
    if not all(type(value) is int for value in groups.values()):
        raise ValueError(f"n_group {raw['n_group']!r}, topk_group {raw['topk_group']!r} (only integers)")
    return deepseek.read_shared_experts(raw) | groups


def write(config: ModelConfig) -> dict:
    groups = {"topk_method": "greedy"}
    if config.n_group:
        groups = {"topk_method": "group_limited_greedy", "n_group": config.n_group, "topk_group": config.topk_group}
    return deepseek.write_shared_experts(config) | groups | {"q_lora_rank": config.q_lora_rank or None}


FAMILY = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    keys=deepseek.KEYS | LATENT | {"routed_scaling_factor": Key(default=1.0), "q_lora_rank": ZERO},
    constants={"norm_topk_prob": False},
    supported=deepseek.SUPPORTED
    | {"norm_topk_prob": (False,), "mlp_bias": (False,), "topk_method": ("greedy", "group_limited_greedy")},
    read=read,
    write=write,
    shared_expert="shared_experts",
)
