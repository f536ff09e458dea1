"""SCAFFOLD on LoRA (Karimireddy et al. 2020, arXiv 1910.06378), option II, with partial participation.

The paper corrects SGD steps: w <- w - lr (g - c_i + c). Here the local step is AdamW's, which would rescale a corrected
gradient; as in the released code of FLEx the correction is a step of its own after AdamW's, w <- w - lr (c - c_i).
Controls are then differences of positions over K lr, not mean gradients: they hold AdamW's directions.
"""

import jax
import jax.numpy as jnp
import optax

from flex_jax.federated.method import Arrived, ClientRule, Method, Outcome, Received, ServerRule, change


def zeros(shared: dict) -> dict:
    return {"control": jax.tree.map(jnp.zeros_like, shared)}


def correction(received: Received) -> dict:
    """c - c_i."""
    return jax.tree.map(jnp.subtract, received.download["control"], received.client.kept["control"])


def optimizer(received: Received, clip, adamw) -> optax.GradientTransformation:
    def correct(updates, trained):
        corrected = jax.tree.map(
            lambda step, drift: step - received.learning_rate * drift, updates["shared"], correction(received)
        )
        return updates | {"shared": corrected}

    return optax.chain(clip, adamw, optax.stateless(correct))


def finish(received: Received, trained: dict) -> Outcome:
    """c_i+ = c_i - c + (x - y_i) / (K lr); the change of c_i is sent."""
    path, delta = received.steps * received.learning_rate, change(received, trained)
    control = jax.tree.map(lambda moved, drift: -moved / path - drift, delta, correction(received))
    upload = {"delta": delta, "control": jax.tree.map(jnp.subtract, control, received.client.kept["control"])}
    return Outcome(upload, trained["personal"], {"control": control})


def update(shared: dict, kept: dict, arrived: Arrived) -> tuple[dict, dict]:
    """x + mean of the deltas; c + |S| / N times the unweighted mean of the changes of the cohort's controls."""
    shared = optax.apply_updates(shared, arrived.mean(arrived.uploads["delta"]))
    cohort = len(arrived.weights)
    changes = arrived.mean(arrived.uploads["control"], weights=jnp.full(cohort, 1 / cohort), clip_norm=0.0)
    control = jax.tree.map(lambda c, change: c + cohort / arrived.clients * change, kept["control"], changes)
    return shared, {"control": control}


METHOD = Method(
    placement=((r".*", "shared"),),
    client=ClientRule(init=lambda shared, settings, client: zeros(shared), optimizer=optimizer, finish=finish),
    server=ServerRule(init=lambda shared, settings, key: zeros(shared), broadcast=lambda kept: kept, update=update),
)
