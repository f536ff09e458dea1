"""FDLoRA (arXiv 2406.07925): a shared adapter behind an outer optimiser, fused with a copy that each client keeps.

    python -m flex_jax.main --config configs/methods/fdlora.py

There is no released code: the outer learning rate and momentum and the rounds between copies are those of its
implementation as a baseline of FedAMoLE. Elsewhere too, server.learning_rate has to be set for it: the default is that
of FedAdam, with which the shared adapter hardly moves.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("fdlora",)
    config.client.sync_every = 5
    config.server.weighting = "uniform"
    config.server.learning_rate = 1.0
    config.server.beta1 = 0.5
    return config
