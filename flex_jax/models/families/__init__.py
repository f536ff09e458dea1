"""The supported model families, by the `model_type` in their config.json. Each has a file here."""

from flex_jax.models.families import deepseek, deepseek_v2, mixtral, olmoe, qwen2_moe, qwen3_moe
from flex_jax.models.families.family import Family

MODULES = (deepseek, deepseek_v2, mixtral, olmoe, qwen2_moe, qwen3_moe)
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in MODULES}
