"""FedIT (arXiv 2305.05644): federated instruction tuning, which is FedAvg on LoRA under another name.

    python -m flex_jax.main --config configs/methods/fedit.py

It has no hyperparameters; the setting is the reference one of configs/default.py.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("fedit",)
    return config
