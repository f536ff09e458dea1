"""FedAdagrad (arXiv 2003.00295): FedAvg whose server divides the mean change by the root of all its squares so far.

    python -m flex_jax.main --config configs/methods/fedadagrad.py

Hyperparameters and equal weights are those of the baseline in the FLEx paper (arXiv 2506.00965).
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("fedadagrad",)
    config.server.weighting = "uniform"
    config.hparams.fedadagrad = {"eta": 1e-3, "tau": 1e-3}
    return config
