"""The supported model families, by the `model_type` of their config.json: one file and one line each."""

from flex_jax.models.families import qwen2_moe

FAMILIES = {"qwen2_moe": qwen2_moe}
