"""Which products the backward pass finds in memory if layers are not rematerialised (config.model.remat)."""

import jax
from jax.ad_checkpoint import checkpoint_name

PRODUCT = "product"
SAVE_PRODUCTS = jax.checkpoint_policies.save_only_these_names(PRODUCT)


def checkpoint_product(product: jax.Array) -> jax.Array:
    """Marks the product of a large matrix, so that the policy SAVE_PRODUCTS saves it.

    Norms, rotations, activations and attention are not marked: the backward pass computes them again from the products.
    """
    return checkpoint_name(product, PRODUCT)
