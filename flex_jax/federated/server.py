"""The server: it sees the uploads of a cohort and the clients' numbers of examples, and nothing else."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from flex_jax.federated.aggregation import combine
from flex_jax.federated.compression import decompress
from flex_jax.federated.method import Arrived, ServerRule, Settings
from flex_jax.federated.state import ServerState


def client_weights(num_examples: jax.Array, weighting: str) -> jax.Array:
    """The weight of each client of a cohort, [C], summing to one; weighting is "examples" or "uniform"."""
    weights = num_examples if weighting == "examples" else jnp.ones_like(num_examples)
    return weights / weights.sum()


def aggregate(
    rule: ServerRule,
    settings: Settings,
    clients: int,
    shapes: dict,
    server: ServerState,
    uploads: dict,
    num_examples: jax.Array,
) -> ServerState:
    """The server's state after a round. uploads: as they were sent, leading axis C; shapes: of one upload before it was
    compressed; num_examples [C]; clients: N, of the federation."""
    uploads = jax.vmap(partial(decompress, like=shapes), axis_size=len(num_examples))(uploads)
    numbers = settings.server
    weights = client_weights(num_examples, numbers.weighting)
    mean = partial(
        combine,
        weights=weights,
        aggregation=numbers.aggregation,
        byzantine=numbers.byzantine,
        clip_norm=numbers.clip_norm,
    )
    return ServerState(*rule.update(server.shared, server.kept, Arrived(uploads, weights, mean, clients, settings)))


def server_optimizer(make: Callable[[Settings], optax.GradientTransformation]) -> ServerRule:
    """A rule that hands the mean change of the shared tree to an optax transformation."""

    def update(shared, kept, arrived):
        updates, kept = make(arrived.settings).update(arrived.mean(arrived.uploads["delta"]), kept, shared)
        return optax.apply_updates(shared, updates), kept

    return ServerRule(init=lambda shared, settings, key: make(settings).init(shared), update=update)
