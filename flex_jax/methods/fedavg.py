"""FedAvg on LoRA (McMahan et al. 2017, arXiv 1602.05629): every adapter is shared and averaged by examples."""

from flex_jax.federated.method import Method


def fedavg() -> Method:
    """Every adapter is shared; all else is the default."""
    return Method(ownership=((r".*", "shared"),))
