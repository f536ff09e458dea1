"""FedProx on LoRA (Li et al. 2020, arXiv 1812.06127): FedAvg whose clients are pulled back to where they started."""

import jax
import optax

from flex_jax.federated.method import ClientRule, Method, Received


def optimizer(received: Received, clip, adamw) -> optax.GradientTransformation:
    """The gradient of the loss + mu / 2 ||w - w_t||^2 in place of that of the loss."""
    mu, start = received.settings.client.proximal_mu, received.download["shared"]

    def pull_back(gradients, trained):
        pulled = jax.tree.map(lambda g, w, w_t: g + mu * (w - w_t), gradients["shared"], trained["shared"], start)
        return gradients | {"shared": pulled}

    return optax.chain(optax.stateless(pull_back), clip, adamw)


METHOD = Method(placement=((r".*", "shared"),), client=ClientRule(optimizer=optimizer))
