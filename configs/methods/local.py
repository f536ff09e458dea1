"""Local: every client trains its own LoRA on its own data, and nothing is sent.

    python -m flex_jax.main --config configs/methods/local.py

It has no hyperparameters; the setting is the reference one of configs/default.py.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("local",)
    return config
