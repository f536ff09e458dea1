"""FedProx on LoRA (Li et al. 2020, arXiv 1812.06127): FedAvg whose clients are pulled back to where they started."""

import jax
import optax

from flex_jax.checks import NotNegative
from flex_jax.federated.method import ClientContext, ClientRule, Method


def fedprox(mu: NotNegative = 0.01) -> Method:
    """Adds mu / 2 ||w - w_t||^2 to the loss. The default is that of the FLEx paper's baseline."""

    def optimizer(context: ClientContext, clip, adamw) -> optax.GradientTransformation:
        w_t = context.download.shared

        def add_pull(gradients, trained):
            pulled = jax.tree.map(lambda g, w, w_t: g + mu * (w - w_t), gradients.shared, trained.shared, w_t)
            return gradients._replace(shared=pulled)

        return optax.chain(optax.stateless(add_pull), clip, adamw)

    return Method(ownership=((r".*", "shared"),), client=ClientRule(optimizer=optimizer))
