"""FedSA-LoRA (Guo et al. 2024, arXiv 2410.01463): A is shared and learns what is common; B stays at home."""

from flex_jax.federated.method import Method

METHOD = Method(placement=((r".*/lora_a", "shared"), (r".*", "personal")), common=False)
