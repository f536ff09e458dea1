"""FedPer on LoRA (arXiv 1912.00818): the adapters of the last layers stay with their client, those below are shared.

    python -m flex_jax.main --config configs/methods/fedper.py

One personal layer is the least; the paper, on other models, compares several cuts.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("fedper",)
    config.client.personal_layers = 1
    return config
