"""FedIT (Zhang et al. 2023, arXiv 2305.05644): federated instruction tuning, which is FedAvg on LoRA."""

from flex_jax.federated.method import Method
from flex_jax.methods.fedavg import fedavg


def fedit() -> Method:
    """FedAvg, under the name that its users look for."""
    return fedavg()
