"""FedDPA-T (arXiv 2403.19211): a shared adapter, and one of the client's own that is trained in the mix of both.

    python -m flex_jax.main --config configs/methods/feddpa.py

As in the released code both adapters get as many steps and clients weigh alike.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("feddpa",)
    config.client.personal_steps = 0.5
    config.server.weighting = "uniform"
    return config
