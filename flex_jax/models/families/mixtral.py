"""Mixtral (8x7B, 8x22B, arXiv 2401.04088): the routing weights of the chosen experts sum to one."""

from flex_jax.models.families.family import ZERO, Family, Key

FAMILY = Family(
    "mixtral",
    "MixtralForCausalLM",
    keys={
        "head_dim": ZERO,
        "num_experts": Key("num_local_experts"),
        "moe_intermediate_size": Key("intermediate_size"),
        "rms_norm_eps": Key(default=1e-5),
    },
    constants={"norm_topk_prob": True},
    supported={"sliding_window": (None,)},
    default_theta=1e6,
    mlp="block_sparse_moe",
    expert=("w1", "w3", "w2"),
)
