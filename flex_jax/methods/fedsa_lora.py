"""FedSA-LoRA (Guo et al. 2024, arXiv 2410.01463): A is shared and learns what is common; B stays with its client."""

from flex_jax.federated.method import Method


def fedsa_lora() -> Method:
    """Shares A and leaves B with the client."""
    return Method(ownership=((r".*/lora_a", "shared"), (r".*", "personal")), has_global_model=False)
