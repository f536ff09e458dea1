"""FedAvgM (arXiv 1909.06335): FedAvg whose server averages the mean change over rounds, a momentum.

    python -m flex_jax.main --config configs/methods/fedavgm.py

The numbers are those of the FLEx paper's (arXiv 2506.00965) baseline, which weighs clients alike here.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("fedavgm",)
    config.server.weighting = "uniform"
    config.server.beta1 = 0.9
    return config
