"""The server: it sees the uploads of a cohort and the clients' numbers of examples, and nothing else."""

import jax

from flex_jax.federated.rules import ServerRule, Settings, client_weights
from flex_jax.federated.state import ServerState


def aggregate(
    rule: ServerRule, settings: Settings, clients: int, server: ServerState, uploads: dict, num_examples: jax.Array
) -> ServerState:
    """The server's state after a round. uploads: leading axis C; num_examples [C]; clients: N, of the federation."""
    weights = client_weights(num_examples, settings)
    return ServerState(*rule.update(server.shared, server.kept, uploads, weights, clients, settings))
