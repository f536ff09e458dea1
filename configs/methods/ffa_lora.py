"""FFA-LoRA (arXiv 2403.12313): A stays as it was initialised, B is shared, so that the mean is that of the products.

    python -m flex_jax.main --config configs/methods/ffa_lora.py

It has no numbers of its own; the setting is the reference one of configs/default.py.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("ffa_lora",)
    return config
