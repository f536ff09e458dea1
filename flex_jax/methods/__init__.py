"""The federated methods, by name: one file and one line each."""

from flex_jax.methods import fedavg, flex, local
from flex_jax.methods.method import Method

METHODS: dict[str, Method] = {
    "fedavg": fedavg.METHOD,
    "flex": flex.METHOD,
    "local": local.METHOD,
}

__all__ = ["METHODS", "Method"]
