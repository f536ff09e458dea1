"""FedMoE-style: clients train the experts that they use most; each is averaged over the clients that train it.

    python -m flex_jax.main --config configs/methods/fedmoe.py

Mei et al. 2024, arXiv 2408.11304, which chooses by usage as here. Two experts a layer and LoRA on them are choices of
this config: the paper searches how many experts each client and layer keeps.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("fedmoe",)
    config.slot.selection = "router"
    config.slot.experts = 2
    config.slot.training = "lora"
    return config
