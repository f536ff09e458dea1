"""The federated methods, by name: one line each."""

from flex_jax.methods import fedavg, fedopt, fedprox, fedsa_lora, ffa_lora, flex, local, scaffold
from flex_jax.methods.method import Method

METHODS: dict[str, Method] = {
    "fedadagrad": fedopt.FEDADAGRAD,
    "fedadam": fedopt.FEDADAM,
    "fedavg": fedavg.METHOD,
    "fedavgm": fedopt.FEDAVGM,
    "fedprox": fedprox.METHOD,
    "fedsa_lora": fedsa_lora.METHOD,
    "fedyogi": fedopt.FEDYOGI,
    "ffa_lora": ffa_lora.METHOD,
    "flex": flex.METHOD,
    "local": local.METHOD,
    "scaffold": scaffold.METHOD,
}

__all__ = ["METHODS", "Method"]
