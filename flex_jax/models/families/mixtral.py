"""Mixtral (8x7B, 8x22B, arXiv 2401.04088): the routing weights of the chosen experts sum to one."""

from flex_jax.models.families.family import COMMON, Family, Key

FAMILY = Family(
    "mixtral",
    "MixtralForCausalLM",
    keys=COMMON
    | {
        "head_dim": Key("head_dim", 0),
        "experts": Key("num_local_experts"),
        "expert_width": Key("intermediate_size"),
        "norm_epsilon": Key("rms_norm_eps", 1e-5),
    },
    constants={"norm_topk_prob": True},
    only={"sliding_window": (None,)},
    default_theta=1e6,
    mlp="block_sparse_moe",
    expert=("w1", "w3", "w2"),
)
