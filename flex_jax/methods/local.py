"""Local: every client trains its own LoRA on its own data, and nothing is sent."""

from flex_jax.federated.method import Method


def local() -> Method:
    """Every adapter is personal."""
    return Method(ownership=((r".*", "personal"),))
