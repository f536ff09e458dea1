"""The paper's reference setting (FLEx, arXiv 2506.00965) on the embedded model and data.

    python -m flex_jax.main --config configs/default.py

Every key, its default and its meaning: python -m flex_jax.main --help
"""

from flex_jax.config import default_config


def get_config():
    return default_config()
