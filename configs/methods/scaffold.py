"""SCAFFOLD on LoRA (arXiv 1910.06378), option II: control variates correct the drift of the clients' steps.

    python -m flex_jax.main --config configs/methods/scaffold.py

It has no hyperparameters here: the server's step is 1, the paper's choice in its experiments.
"""

from flex_jax.config import default_config


def get_config():
    config = default_config()
    config.methods = ("scaffold",)
    return config
