"""FFA-LoRA (Sun et al. 2024, arXiv 2403.12313): A stays as it was initialised, B is shared, so that the mean of the
products is the product of the means."""

from flex_jax.federated.method import Method

METHOD = Method(placement=((r".*/lora_a", "frozen"), (r".*", "shared")))
