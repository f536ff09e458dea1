"""FedYogi (arXiv 2003.00295): FedAdam whose second moment changes by a bounded step.

    python -m flex_jax.main --config configs/methods/fedyogi.py

The numbers are those of the FLEx paper's (arXiv 2506.00965) baseline, which weighs clients alike here.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("fedyogi",)
    config.server.weighting = "uniform"
    config.server.learning_rate = 1e-3
    config.server.tau = 1e-3
    config.server.beta1 = 0.9
    config.server.beta2 = 0.99
    return config
