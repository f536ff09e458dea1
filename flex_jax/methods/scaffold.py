"""SCAFFOLD on LoRA (Karimireddy et al. 2020, arXiv 1910.06378), option II, with partial participation.

The paper corrects SGD steps: w <- w - lr (g - c_i + c). Here the local step is AdamW's, which would rescale a corrected
gradient; as in the released code of FLEx the correction is a step of its own after AdamW's, w <- w - lr (c - c_i).
Controls are then differences of positions over K lr, not mean gradients: they hold AdamW's directions.
"""

import jax
import jax.numpy as jnp
import optax

from flex_jax.federated.rules import ClientRule, Received, Rules, ServerRule, weighted_mean
from flex_jax.methods.method import Method


def zeros(shared: dict) -> dict:
    return {"control": jax.tree.map(jnp.zeros_like, shared)}


def correction(received: Received) -> dict:
    """c - c_i."""
    return jax.tree.map(jnp.subtract, received.download["control"], received.state["control"])


def optimizer(received: Received, clip, adamw) -> optax.GradientTransformation:
    def correct(updates, trained):
        corrected = jax.tree.map(
            lambda step, drift: step - received.learning_rate * drift, updates["shared"], correction(received)
        )
        return updates | {"shared": corrected}

    return optax.chain(clip, adamw, optax.stateless(correct))


def finish(received: Received, trained: dict) -> tuple[dict, dict]:
    """c_i+ = c_i - c + (x - y_i) / (K lr); the change of c_i is sent."""
    path = received.steps * received.learning_rate
    moved = jax.tree.map(lambda x, y: (x - y) / path, received.download["shared"], trained)
    control = jax.tree.map(jnp.subtract, moved, correction(received))
    change = jax.tree.map(jnp.subtract, control, received.state["control"])
    return {"control": change}, {"control": control}


def update(shared, kept, uploads, weights, clients, settings) -> tuple[dict, dict]:
    """x + weighted mean of the deltas; c + 1 / N sum of the changes of the cohort's controls."""
    shared = optax.apply_updates(shared, weighted_mean(uploads["delta"], weights))
    control = jax.tree.map(lambda c, change: c + change.sum(0) / clients, kept["control"], uploads["control"])
    return shared, {"control": control}


METHOD = Method(
    placement=((r".*", "shared"),),
    rules=Rules(
        client=ClientRule(init=zeros, optimizer=optimizer, finish=finish),
        server=ServerRule(init=lambda shared, settings: zeros(shared), broadcast=lambda kept: kept, update=update),
    ),
)
