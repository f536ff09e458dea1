"""FedAvg on LoRA (arXiv 1602.05629): every adapter is shared and averaged by examples.

    python -m flex_jax.main --config configs/methods/fedavg.py

It has no hyperparameters; the setting is the reference one of configs/default.py.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("fedavg",)
    return config
