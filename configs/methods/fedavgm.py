"""FedAvgM (arXiv 1909.06335): FedAvg whose server has momentum: it averages the mean change over rounds.

    python -m flex_jax.main --config configs/methods/fedavgm.py

Momentum and equal weights are those of the baseline in the FLEx paper (arXiv 2506.00965).
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("fedavgm",)
    config.server.weighting = "uniform"
    config.hparams.fedavgm = {"beta1": 0.9}
    return config
