"""The server: it sees the shared deltas of a cohort and the clients' numbers of examples, and nothing else."""

import jax
import jax.numpy as jnp

from flex_jax.federated.state import ServerState


def aggregate(server: ServerState, deltas: dict, num_examples: jax.Array) -> ServerState:
    """FedAvg (McMahan et al. 2017, arXiv 1602.05629): add the mean of `deltas`, weighted by examples.

    deltas: the structure of `server.shared` with a leading axis C; num_examples [C].
    """
    weights = num_examples / num_examples.sum()

    def mean(value, delta):
        return value + jnp.tensordot(weights, delta, axes=1)

    return ServerState(shared=jax.tree.map(mean, server.shared, deltas))
