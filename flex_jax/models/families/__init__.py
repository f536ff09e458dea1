"""The supported model families, by the `model_type` of their config.json: one file and one line each."""

from flex_jax.models.families import deepseek, deepseek_v2, mixtral, olmoe, qwen2_moe, qwen3_moe
from flex_jax.models.families.family import Family

FAMILIES: dict[str, Family] = {
    "deepseek": deepseek.FAMILY,
    "deepseek_v2": deepseek_v2.FAMILY,
    "mixtral": mixtral.FAMILY,
    "olmoe": olmoe.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
}
