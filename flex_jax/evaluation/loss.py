"""Loss on held-out responses, every client's with its own adapters."""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from flex_jax.data.batches import Batch
from flex_jax.federated.client import collections
from flex_jax.federated.method import Recipe
from flex_jax.federated.state import ClientState, Frozen, ServerState
from flex_jax.models.objective import response_loss


@partial(jax.jit, static_argnums=0)
def _batch_loss(recipe, frozen, server, clients, batch):
    def one(client, batch):
        variables = collections(recipe, frozen, server, client)
        return response_loss(recipe.model, variables, batch.tokens, batch.loss_mask)

    return jax.vmap(one)(clients, batch)


def evaluation_loss(
    recipe: Recipe, frozen: Frozen, server: ServerState, clients: ClientState, batches: Sequence[Batch]
) -> np.ndarray:
    """Mean cross-entropy per response token, nats, [C] float64. batches: leading axes [C, B, S]."""
    sums = [_batch_loss(recipe, frozen, server, clients, batch) for batch in batches]
    total, count = np.asarray(jax.device_get(sums), np.float64).sum(0)
    return total / count
