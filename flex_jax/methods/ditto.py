"""Ditto on LoRA (Li et al. 2021, arXiv 2012.04221): FedAvg, and beside it a model of each client's own that is pulled
towards the one it received.

    w: FedAvg's w_k        v: min F_k(v) + lambda / 2 ||v - w^t||^2        the client's model is v

Both take a step on every batch, as in the released code; v and w have each their own clipping and AdamW. The paper's
step is SGD's, v <- v - lr (grad F_k(v) + lambda (v - w^t)). Here the pull is a proximal step after AdamW's,
v <- (v' + lr lambda w^t) / (1 + lr lambda): the paper's to first order in lr where v' is SGD's, and stable for every
lambda, v = w^t in the limit. It is decoupled, like AdamW's weight decay: AdamW's step has a size of its own, whatever
that of the gradient, so that a lambda does not balance the two as in the paper. K steps close a share
1 - (1 + lr lambda)^-K of the distance, which at the small rates of LoRA asks for a lambda of about 1 / (K lr).
"""

import jax
import optax

from flex_jax.federated.method import ClientRule, Loss, Method, Received


def compose(tree: dict, received: Received) -> dict:
    """v, or w where there is no v."""
    return tree["own"] if "own" in tree else tree["global"]


def objective(received: Received, trained: dict, loss: Loss) -> tuple[jax.Array, jax.Array]:
    """Two problems at once, neither of which depends on the other's part."""
    own = loss(trained["personal"])
    return loss(trained["shared"]) + own, own


def optimizer(received: Received, clip, adamw) -> optax.GradientTransformation:
    strength = received.learning_rate * received.settings.client.ditto_lambda
    share = strength / (1.0 + strength)  # of the way from v' to w^t
    w_t = received.download["shared"]["global"]

    def pull(updates, trained):
        v, step = trained["personal"]["own"], updates["personal"]["own"]
        pulled = jax.tree.map(lambda v, step, w: step + share * (w - (v + step)), v, step, w_t)
        return updates | {"personal": {"own": pulled}}

    step = optax.chain(clip, adamw)
    apart = optax.partition({"w": step, "v": step}, {"shared": "w", "personal": "v"})
    return optax.chain(apart, optax.stateless(pull))


METHOD = Method(
    placement=((r"global/.*", "shared"), (r"own/.*", "personal")),
    client=ClientRule(objective=objective, optimizer=optimizer),
    build=lambda adapters, key, settings: {"global": adapters, "own": adapters},
    compose=compose,
)
