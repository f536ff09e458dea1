"""What a backward pass finds in memory where layers are not computed again as a whole (config.model.remat)."""

import jax
from jax.ad_checkpoint import checkpoint_name

PRODUCT = "product"  # of a large matrix: keeping it saves the matmul
SAVED = jax.checkpoint_policies.save_only_these_names(PRODUCT)


def saved(product: jax.Array) -> jax.Array:
    """Marks a product as one to keep. Norms, rotations, activations and attention are computed again from those."""
    return checkpoint_name(product, PRODUCT)
