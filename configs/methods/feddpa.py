"""FedDPA-T (arXiv 2403.19211): a shared adapter, and a personal one that is trained in the mix of both.

    python -m flex_jax.main --config configs/methods/feddpa.py

As in the released code both adapters get equally many steps, and clients have equal weights.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("feddpa",)
    config.hparams.feddpa = {"personal_steps": 0.5}
    config.server.weighting = "uniform"
    return config
