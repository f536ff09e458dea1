"""FedProx on LoRA (Li et al. 2020, arXiv 1812.06127): FedAvg whose clients are pulled back to where they started."""

import jax
import optax

from flex_jax.federated.rules import ClientRule, Received, Rules
from flex_jax.methods.method import Method


def optimizer(received: Received, clip, adamw) -> optax.GradientTransformation:
    """The gradient of the loss + mu / 2 ||w - w_t||^2 in place of that of the loss."""
    mu, start = received.settings.proximal_mu, received.download["shared"]

    def pull_back(gradients, trained):
        pulled = jax.tree.map(lambda g, w, w_t: g + mu * (w - w_t), gradients["shared"], trained["shared"], start)
        return gradients | {"shared": pulled}

    return optax.chain(optax.stateless(pull_back), clip, adamw)


METHOD = Method(placement=((r".*", "shared"),), rules=Rules(client=ClientRule(optimizer=optimizer)))
