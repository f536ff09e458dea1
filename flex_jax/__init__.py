"""flex_jax: federated personalisation of pretrained mixture-of-experts language models (FLEx, arXiv 2506.00965)."""

import os

# Or transformers, of which only tokenizers are used here, says at every start that it misses PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from flex_jax.models.checkpoint import load_pretrained  # noqa: E402

__all__ = ["load_pretrained"]
__version__ = "0.1.0"
