"""The server: it gets the uploads of a cohort and the clients' numbers of examples, and nothing else."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from flex_jax.federated.aggregation import RULES, clip
from flex_jax.federated.compression import decompress
from flex_jax.federated.method import MethodSpec, ServerContext, ServerRule, Settings, Upload
from flex_jax.federated.state import ServerState


def client_weights(num_examples: jax.Array, weighting: str) -> jax.Array:
    """Returns the weight of each client of a cohort, [C], with sum one. weighting: "examples" or "uniform".

    A client without examples is not in the cohort; its weight is 0.
    """
    weights = num_examples if weighting == "examples" else jnp.sign(num_examples)
    return weights / weights.sum()


def make_mean(settings: Settings, client_weights: jax.Array) -> Callable[..., dict]:
    """Returns the aggregation that the settings ask for, a function of a tree with a leading axis C."""

    def mean(stacked: dict, *, weights: jax.Array | None = None) -> dict:
        if not jax.tree.leaves(stacked):  # the method shares nothing
            return stacked
        chosen = client_weights if weights is None else weights
        return RULES[settings.aggregation](stacked, chosen, settings.byzantine, client_weights > 0)

    return mean


def aggregate(
    spec: MethodSpec,
    num_clients: int,
    upload_shapes: Upload,
    server: ServerState,
    uploads: Upload,
    num_examples: jax.Array,
) -> ServerState:
    """Returns the server's state after a round.

    `num_clients` is N, that of the federation; `upload_shapes` is one upload before compression; `uploads` is
    what was sent, leading axis C; num_examples [C] float32, 0 for a client that is left out of the round: then its
    upload may be anything.
    """

    def read(upload, examples):
        return jax.tree.map(lambda leaf: jnp.where(examples > 0, leaf, 0), decompress(upload, like=upload_shapes))

    uploads = jax.vmap(read)(uploads, num_examples)
    if spec.settings.clip_norm > 0 and jax.tree.leaves(uploads.delta):
        uploads = uploads._replace(delta=clip(uploads.delta, spec.settings.clip_norm))
    weights = client_weights(num_examples, spec.settings.weighting)
    context = ServerContext(uploads, weights, make_mean(spec.settings, weights), num_clients)
    return spec.method.server.update(server, context)


def server_optimizer(optimizer: optax.GradientTransformation) -> ServerRule:
    """Returns the rule that hands the mean change of the shared tree to an optax transformation."""

    def update(server: ServerState, context: ServerContext) -> ServerState:
        mean = context.mean(context.uploads.delta)
        updates, extra = optimizer.update(mean, server.extra, server.shared)
        return ServerState(optax.apply_updates(server.shared, updates), extra)

    return ServerRule(init_extra=lambda shared, key: optimizer.init(shared), update=update)
