"""One client's round: a scan over local steps on its shared and personal adapters."""

import jax
import jax.numpy as jnp
import optax

from flex_jax.data.batches import Batch
from flex_jax.federated.placement import merge
from flex_jax.federated.rules import ClientRule, Received
from flex_jax.federated.state import ClientState, ClientUpdate, Frozen
from flex_jax.models.decoder import Decoder
from flex_jax.models.objective import response_loss


def collections(frozen: Frozen, shared: dict, client: ClientState) -> dict:
    """The model's collections for one client."""
    adapters = merge(frozen.adapters, shared, client.personal)
    return {"params": frozen.params, "adapters": adapters, "grafts": client.grafts}


def client_round(
    model: Decoder,
    rule: ClientRule,
    received: Received,
    frozen: Frozen,
    client: ClientState,
    batches: Batch,
    key: jax.Array,
    *,
    weight_decay: float,
    clip_norm: float,
) -> ClientUpdate:
    """Train one client from what it received on batches [steps, B, S]; the mean loss of a step is over its response
    tokens. AdamW, whose moments start anew every round, behind clipping by the joint norm of all that the client
    trains; `rule` says what the method changes. Metrics: train_loss (nats a token) and grad_norm (before clipping and
    the method's corrections), means over steps."""
    shared = received.download["shared"]
    adamw = optax.adamw(received.learning_rate, weight_decay=weight_decay)
    optimizer = rule.optimizer(received, optax.clip_by_global_norm(clip_norm), adamw)

    def loss(trained, batch, step_key):
        variables = collections(frozen, trained["shared"], client._replace(personal=trained["personal"]))
        total, count = response_loss(model, variables, batch.tokens, batch.loss_mask, step_key)
        return total / jnp.maximum(count, 1.0)

    def step(carry, inputs):
        trained, opt_state = carry
        value, gradients = jax.value_and_grad(loss)(trained, *inputs)
        updates, opt_state = optimizer.update(gradients, opt_state, trained)
        return (optax.apply_updates(trained, updates), opt_state), (value, optax.tree.norm(gradients))

    start = {"shared": shared, "personal": client.personal}
    step_keys = jax.random.split(key, batches.tokens.shape[0])
    (trained, _), (losses, norms) = jax.lax.scan(step, (start, optimizer.init(start)), (batches, step_keys))
    beside, kept = rule.finish(received, trained["shared"])
    return ClientUpdate(
        upload={"delta": jax.tree.map(jnp.subtract, trained["shared"], shared), **beside},
        state=client._replace(personal=trained["personal"], kept=kept),
        metrics={"train_loss": losses.mean(), "grad_norm": norms.mean()},
    )
