"""Loss on held-out responses, every client with its own model."""

from collections.abc import Sequence

import jax
import numpy as np

from flex_jax.data.batches import Batch
from flex_jax.federated.client import ClientModels
from flex_jax.models.objective import response_loss


@jax.jit
def _batch_loss(models: ClientModels, batch: Batch):
    def one(client, batch):
        return response_loss(models.spec.model, models.variables(client), batch.tokens, batch.loss_mask)

    return jax.vmap(one)(models.clients, batch)


def evaluation_loss(models: ClientModels, batches: Sequence[Batch]) -> np.ndarray:
    """Returns the mean cross-entropy per response token in nats, [C] float64. batches: leading axes [C, B, S]."""
    sums = [_batch_loss(models, batch) for batch in batches]
    total, count = np.asarray(jax.device_get(sums), np.float64).sum(0)
    return total / count
