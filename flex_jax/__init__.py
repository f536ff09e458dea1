"""flex_jax: federated personalisation of pretrained mixture-of-experts language models (FLEx, arXiv 2506.00965).

Importing this package imports neither JAX nor transformers: a name below is imported when it is first used (PEP 562).
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flex_jax.config import default_config
    from flex_jax.experiment import run
    from flex_jax.federated.federated_round import make_round
    from flex_jax.federated.init import start
    from flex_jax.federated.method import Method, MethodSpec
    from flex_jax.methods import METHODS
    from flex_jax.models.checkpoint import load_pretrained

# transformers warns at every start that PyTorch is missing. Only its tokenizers are used here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
__all__ = ["METHODS", "Method", "MethodSpec", "default_config", "load_pretrained", "make_round", "run", "start"]

_MODULES = {
    "METHODS": "methods",
    "Method": "federated.method",
    "MethodSpec": "federated.method",
    "default_config": "config",
    "load_pretrained": "models.checkpoint",
    "make_round": "federated.federated_round",
    "run": "experiment",
    "start": "federated.init",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
