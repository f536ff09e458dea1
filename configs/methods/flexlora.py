"""FlexLoRA (Bai et al. 2024, arXiv 2402.11505): the server averages products of adapters and shares out their SVD.

    python -m flex_jax.main --config configs/methods/flexlora.py

Ten clients, most of them small: near the heavy tail of the released code, whose clients have rank 8 (80 in 100), 200
(10), 30 on attention (5) and 30 everywhere (5); only attention has adapters here. There the scale is 16 / r_k; here it
is that of rank 8 for all.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("flexlora",)
    config.clients = 10
    config.data.partition = "dirichlet"
    config.client.ranks = (8, 8, 8, 8, 8, 8, 8, 8, 200, 30)
    config.lora.rank = 200
    config.lora.alpha = 400.0
    return config
