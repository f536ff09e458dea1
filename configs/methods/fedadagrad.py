"""FedAdagrad (arXiv 2003.00295): FedAvg whose server divides the mean change by the root of all its squares so far.

    python -m flex_jax.main --config configs/methods/fedadagrad.py

The numbers are those of the FLEx paper's (arXiv 2506.00965) baseline, which weighs clients alike here.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("fedadagrad",)
    config.server.weighting = "uniform"
    config.server.learning_rate = 1e-3
    config.server.tau = 1e-3
    return config
