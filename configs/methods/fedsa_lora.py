"""FedSA-LoRA (arXiv 2410.01463): A is shared and learns what is common; B stays with its client.

    python -m flex_jax.main --config configs/methods/fedsa_lora.py

It has no hyperparameters; the setting is the reference one of configs/default.py.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("fedsa_lora",)
    return config
