"""FedYogi (arXiv 2003.00295): FedAdam whose second moment changes by a bounded step.

    python -m flex_jax.main --config configs/methods/fedyogi.py

Hyperparameters and equal weights are those of the baseline in the FLEx paper (arXiv 2506.00965).
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("fedyogi",)
    config.server.weighting = "uniform"
    config.hparams.fedyogi = {"eta": 1e-3, "tau": 1e-3, "beta1": 0.9, "beta2": 0.99}
    return config
