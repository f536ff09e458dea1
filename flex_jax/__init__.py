"""flex_jax: federated personalisation of pretrained mixture-of-experts language models (FLEx, arXiv 2506.00965)."""

from flex_jax.models.checkpoint import load_pretrained

__all__ = ["load_pretrained"]
__version__ = "0.1.0"
