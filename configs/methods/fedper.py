"""FedPer on LoRA (arXiv 1912.00818): the adapters of the last layers stay with their client, those below are shared.

    python -m flex_jax.main --config configs/methods/fedper.py

One personal layer is the smallest choice. The paper compares several, on other models.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("fedper",)
    config.hparams.fedper = {"personal_layers": 1}
    return config
