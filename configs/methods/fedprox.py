"""FedProx on LoRA (arXiv 1812.06127): FedAvg whose clients are pulled back to where they started.

    python -m flex_jax.main --config configs/methods/fedprox.py

mu is that of the FLEx paper's baseline (arXiv 2506.00965); the FedProx paper tunes it over 0.001 to 1 for each task.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("fedprox",)
    config.hparams.fedprox = {"mu": 0.01}
    return config
