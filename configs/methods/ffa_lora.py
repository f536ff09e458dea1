"""FFA-LoRA (arXiv 2403.12313): A stays as it was initialised, B is shared, so the mean of the products is exact.

    python -m flex_jax.main --config configs/methods/ffa_lora.py

It has no hyperparameters; the setting is the reference one of configs/default.py.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("ffa_lora",)
    return config
