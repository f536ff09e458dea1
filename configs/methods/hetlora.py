"""HetLoRA (Cho et al. 2024, arXiv 2401.06432): adapters truncated and padded to clients' ranks, which prune themselves.

    python -m flex_jax.main --config configs/methods/hetlora.py

The paper draws ranks from 5 to 50 by a power law, most of them small, and prunes to 0.99 of them. These ten ranks are
such a draw, made by hand. The penalty, which the paper tunes, is this project's choice.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("hetlora",)
    config.clients = 10
    config.data.partition = "dirichlet"
    config.hparams.hetlora = {"ranks": (5, 5, 5, 6, 7, 9, 12, 18, 30, 50), "gamma": 0.99, "lambda_": 5e-3}
    config.lora.rank = 50
    config.lora.alpha = 100.0
    return config
