"""APFL on LoRA (Deng et al. 2020, arXiv 2003.13461): a client's model mixes personal and global weights.

The client learns how much of each it needs:

    w <- w - lr grad f(w)        v <- v - lr grad_v f(v_bar), v_bar = alpha v + (1 - alpha) w
    alpha <- alpha - lr <v - w, grad f(v_bar)>, within [0, 1]

Only w is sent and averaged. v and alpha stay, and v_bar is evaluated. A and B are mixed separately, so v_bar has the
rank of its parts (the product of the mixtures is not the mixture of the products). All three take their step at once on
every batch. The released code instead mixes logits, updates alpha once a round, and decays it a little. w and v have
separate clipping and AdamW, which undoes the factor alpha in v's gradient. alpha's step is the paper's, without
clipping and AdamW, with the learning rate of the round.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flex_jax.checks import Unit
from flex_jax.federated.method import ClientContext, ClientRule, Loss, Method, Trained
from flex_jax.methods._personal_copy import OWNERSHIP, copy_adapters, or_global


@or_global
def compose(adapters: dict, client_extra: dict, replicated: dict) -> dict:
    """v_bar."""
    alpha = adapters["alpha"]
    return jax.tree.map(lambda v, w: alpha * v + (1.0 - alpha) * w, adapters["personal"], adapters["global"])


def objective(context: ClientContext, trained: Trained, loss: Loss) -> tuple[jax.Array, jax.Array]:
    """f(w) + f(v_bar), with w fixed in the mixture."""
    mixture = loss(jax.lax.stop_gradient(trained.shared) | trained.personal)
    return loss(trained.shared) + mixture, mixture


def optimizer(context: ClientContext, clip, adamw) -> optax.GradientTransformation:
    step = optax.chain(clip, adamw)

    def stay_in_unit_interval(update: Any, alpha: Any) -> Any:
        return jnp.clip(alpha + update, 0.0, 1.0) - alpha

    plain = optax.chain(optax.sgd(context.learning_rate), optax.stateless_with_tree_map(stay_in_unit_interval))
    labels = Trained(shared="w", personal={"personal": "v", "alpha": "alpha"})  # pyright: ignore[reportArgumentType]
    return optax.partition({"w": step, "v": step, "alpha": plain}, labels)


def apfl(alpha: Unit = 0.5) -> Method:
    """Mixes v and w; `alpha` is the first share of v."""

    def build(adapters: dict, key: jax.Array) -> dict:
        return copy_adapters(adapters, key) | {"alpha": jnp.float32(alpha)}

    return Method(
        ownership=OWNERSHIP, client=ClientRule(objective=objective, optimizer=optimizer), build=build, compose=compose
    )
