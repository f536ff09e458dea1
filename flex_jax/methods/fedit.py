"""FedIT (Zhang et al. 2023, arXiv 2305.05644): federated instruction tuning, which is FedAvg on LoRA: A and B are each
averaged by examples. The name that its users look for; the method is `fedavg`."""

from flex_jax.methods import fedavg

METHOD = fedavg.METHOD
