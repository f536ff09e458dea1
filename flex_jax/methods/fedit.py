"""FedIT (Zhang et al. 2023, arXiv 2305.05644): federated instruction tuning.

It is FedAvg on LoRA: A and B are each averaged by examples. The file gives it the name that its users look for.
"""

from flex_jax.federated.method import Method
from flex_jax.methods.fedavg import fedavg


def fedit() -> Method:
    """FedAvg under another name."""
    return fedavg()
