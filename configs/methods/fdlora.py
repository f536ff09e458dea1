"""FDLoRA (arXiv 2406.07925): a shared adapter with an outer optimiser, fused with a personal copy.

    python -m flex_jax.main --config configs/methods/fdlora.py

There is no released code. The outer learning rate, its momentum and the rounds between copies are those of the
baseline in FedAMoLE's code. With the default eta, which is FedAdam's, the shared adapter hardly moves: set it in other
configs too.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("fdlora",)
    config.hparams.fdlora = {"sync_every": 5, "eta": 1.0, "beta1": 0.5}
    config.server.weighting = "uniform"
    return config
