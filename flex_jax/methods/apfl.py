"""APFL on LoRA (Deng et al. 2020, arXiv 2003.13461): a client's model is a mixture of its own weights and the common
ones, and it learns how much of each.

    w <- w - lr grad f(w)        v <- v - lr grad_v f(v_bar), v_bar = alpha v + (1 - alpha) w
    alpha <- alpha - lr <v - w, grad f(v_bar)>, within [0, 1]

Only w is sent and averaged; v and alpha stay, and v_bar is evaluated. A and B are mixed each by itself, so that v_bar
has the rank of its parts (the product of the mixtures is not the mixture of the products). All three take their step
at once on every batch; the released code mixes logits instead, updates alpha once a round, and decays it a little.
w and v have each their own clipping and AdamW, which undoes the factor alpha in v's gradient; alpha's step is the
paper's, neither clipped nor AdamW's, with the learning rate of the round.
"""

import jax
import jax.numpy as jnp
import optax

from flex_jax.federated.method import ClientRule, Loss, Method, Received, Settings


def build(adapters: dict, key: jax.Array, settings: Settings) -> dict:
    return {"global": adapters, "own": adapters, "alpha": jnp.float32(settings.client.mixing_alpha)}


def compose(tree: dict, received: Received) -> dict:
    """v_bar, or w alone where there is no v."""
    if "own" not in tree:
        return tree["global"]
    alpha = tree["alpha"]
    return jax.tree.map(lambda v, w: alpha * v + (1.0 - alpha) * w, tree["own"], tree["global"])


def objective(received: Received, trained: dict, loss: Loss) -> tuple[jax.Array, jax.Array]:
    """f(w) + f(v_bar), in which w is fixed for the mixture."""
    mixture = loss(jax.lax.stop_gradient(trained["shared"]) | trained["personal"])
    return loss(trained["shared"]) + mixture, mixture


def optimizer(received: Received, clip, adamw) -> optax.GradientTransformation:
    step = optax.chain(clip, adamw)
    within = optax.stateless_with_tree_map(lambda update, alpha: jnp.clip(alpha + update, 0.0, 1.0) - alpha)
    plain = optax.chain(optax.sgd(received.learning_rate), within)
    labels = {"shared": "w", "personal": {"own": "v", "alpha": "alpha"}}
    return optax.partition({"w": step, "v": step, "alpha": plain}, labels)


METHOD = Method(
    placement=((r"global/.*", "shared"), (r"own/.*|alpha", "personal")),
    client=ClientRule(objective=objective, optimizer=optimizer),
    build=build,
    compose=compose,
)
