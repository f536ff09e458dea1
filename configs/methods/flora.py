"""FLoRA (Wang et al. 2024, arXiv 2409.05976): clients' adapters of any ranks are stacked and merged into the backbone.

    python -m flex_jax.main --config configs/methods/flora.py

Ten clients with the ranks of the released code, where alpha is twice the rank of every client.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("flora",)
    config.clients = 10
    config.data.partition = "dirichlet"
    config.hparams.flora = {"ranks": (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)}
    config.lora.rank = 64
    config.lora.alpha = 128.0
    return config
