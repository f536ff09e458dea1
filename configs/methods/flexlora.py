"""FlexLoRA (Bai et al. 2024, arXiv 2402.11505): the server averages products of adapters and distributes their SVD.

    python -m flex_jax.main --config configs/methods/flexlora.py

Ten clients, most of them small, similar to the released code: there 80 of 100 clients have rank 8, 10 have rank 200, 5
have 30 on attention and 5 have 30 everywhere. Here only attention has adapters. There the scale is 16 / r_k; here all
have that of rank 8.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("flexlora",)
    config.clients = 10
    config.data.partition = "dirichlet"
    config.hparams.flexlora = {"ranks": (8, 8, 8, 8, 8, 8, 8, 8, 200, 30)}
    config.lora.rank = 200
    config.lora.alpha = 400.0
    return config
