"""FedALA on LoRA: a client learns, for every weight of its last layers, how much of the global model it takes.

    python -m flex_jax.main --config configs/methods/fedala.py

Zhang et al. 2023, arXiv 2212.01197. eta 1 and one layer are theirs, for SGD on all weights of small networks.
LoRA's weights and gradients are smaller: only a larger eta makes the result differ from the global model.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("fedala",)
    config.hparams.fedala = {"eta": 1.0, "personal_layers": 1}
    return config
