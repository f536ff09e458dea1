"""FFA-LoRA (Sun et al. 2024, arXiv 2403.12313): A stays as it was initialised and B is shared.

So the mean of the products is the product of the means.
"""

from flex_jax.federated.method import Method


def ffa_lora() -> Method:
    """Freezes A and shares B."""
    return Method(ownership=((r".*/lora_a", "frozen"), (r".*", "shared")))
