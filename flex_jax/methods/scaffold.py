"""SCAFFOLD on LoRA (Karimireddy et al. 2020, arXiv 1910.06378), option II, with partial participation.

The paper corrects SGD steps: w <- w - lr (g - c_i + c). Here the local step is AdamW's, which would rescale a corrected
gradient. So, as in the released code of FLEx, the correction is a separate step after AdamW's, w <- w - lr (c - c_i).
A control is then the client's displacement divided by K lr: it points where AdamW moved, not along the mean gradient.

Below, x is the downloaded tree, y_i the trained one, K the number of steps, S the cohort of N clients.
"""

import jax
import jax.numpy as jnp
import optax

from flex_jax.federated.method import (
    ClientContext,
    ClientResult,
    ClientRule,
    Method,
    ServerContext,
    ServerRule,
    Trained,
    Upload,
    delta,
)
from flex_jax.federated.state import ServerState


def init_control(shared: dict, _client_id_or_key) -> dict:
    """c, or c_i: zero at first."""
    return {"control": jax.tree.map(jnp.zeros_like, shared)}


def correction(context: ClientContext) -> dict:
    """c - c_i."""
    return jax.tree.map(jnp.subtract, context.download.extra["control"], context.state.extra["control"])


def optimizer(context: ClientContext, clip, adamw) -> optax.GradientTransformation:
    """AdamW's step, then w <- w - lr (c - c_i)."""

    def correct(updates, trained):
        corrected = jax.tree.map(lambda u, d: u - context.learning_rate * d, updates.shared, correction(context))
        return updates._replace(shared=corrected)

    return optax.chain(clip, adamw, optax.stateless(correct))


def make_result(context: ClientContext, trained: Trained) -> ClientResult:
    """c_i+ = c_i - c + (x - y_i) / (K lr); the client uploads c_i+ - c_i."""
    total_rate, moved = context.num_steps * context.learning_rate, delta(context, trained)
    control = jax.tree.map(lambda m, d: -m / total_rate - d, moved, correction(context))
    change = jax.tree.map(jnp.subtract, control, context.state.extra["control"])
    return ClientResult(Upload(moved, {"control": change}), trained.personal, {"control": control})


def update(server: ServerState, context: ServerContext) -> ServerState:
    """x + mean of the deltas; c + |S| / N times the unweighted mean of the changes of the cohort's controls."""
    shared = optax.apply_updates(server.shared, context.mean(context.uploads.delta))
    cohort_size = (context.weights > 0).sum()
    uniform = (context.weights > 0) / cohort_size
    change = context.mean(context.uploads.extra["control"], weights=uniform)
    part = cohort_size / context.num_clients
    control = jax.tree.map(lambda c, dc: c + part * dc, server.extra["control"], change)
    return ServerState(shared, {"control": control})


def scaffold() -> Method:
    """Corrects the drift of each client by control variates, which it downloads and uploads."""
    return Method(
        ownership=((r".*", "shared"),),
        client=ClientRule(init_extra=init_control, optimizer=optimizer, make_result=make_result),
        server=ServerRule(init_extra=init_control, extra_visibility="broadcast", update=update),
    )
