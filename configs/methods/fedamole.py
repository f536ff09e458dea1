"""FedAMoLE-style: each projection has a common LoRA expert, and routed ones of which each client trains some.

    python -m flex_jax.main --config configs/methods/fedamole.py

Rank 8, alpha 16, dropout 0.05, uniform weights and two clients for each expert are those of Zhang et al. 2024, arXiv
2411.19128, and their code, which has 30 experts for 10 clients, 6 for each client. Here it is 2 of 4 for 4 clients.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("fedamole",)
    config.lora.rank = 8
    config.lora.alpha = 16.0
    config.lora.dropout = 0.05
    config.hparams.fedamole = {"num_experts": 4, "client_experts": 2}
    config.server.weighting = "uniform"
    return config
