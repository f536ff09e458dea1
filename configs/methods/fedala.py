"""FedALA on LoRA: a client learns, for every weight of its last layers, how much of the common model it takes over.

    python -m flex_jax.main --config configs/methods/fedala.py

Zhang et al. 2023, arXiv 2212.01197. eta 1 and one layer weighed are theirs, for SGD on all weights of small networks;
LoRA's weights and gradients are smaller, and eta has to be larger for the client's weighing to differ from taking all.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("fedala",)
    config.client.weight_learning_rate = 1.0
    config.client.personal_layers = 1
    return config
