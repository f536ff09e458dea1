"""APFL on LoRA: a client's model mixes personal and global adapters, in a proportion that it learns.

    python -m flex_jax.main --config configs/methods/apfl.py

Deng et al. 2020, arXiv 2003.13461. The clients of a round have equal weights, and alpha starts at 0.5, as in the
authors' code.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("apfl",)
    config.hparams.apfl = {"alpha": 0.5}
    config.server.weighting = "uniform"
    return config
