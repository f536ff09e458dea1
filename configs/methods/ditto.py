"""Ditto on LoRA: FedAvg, and personal adapters that are pulled towards the downloaded ones.

    python -m flex_jax.main --config configs/methods/ditto.py

Li et al. 2021, arXiv 2012.04221. lambda 1 and equal weights are those of the authors' code, for SGD. The
pull here is decoupled from AdamW's step: a round closes about lambda x learning rate x local steps of the distance, so
lambda 1 is close to local training at this learning rate. 1 / (learning rate x local steps) is a strong pull.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("ditto",)
    config.hparams.ditto = {"lambda_": 1.0}
    config.server.weighting = "uniform"
    return config
