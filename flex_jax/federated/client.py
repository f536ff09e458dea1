"""One client's round: a scan over local steps on what its method trains."""

import jax
import jax.numpy as jnp
import optax

from flex_jax.data.batches import Batch
from flex_jax.federated.compression import compress
from flex_jax.federated.method import Received, Recipe
from flex_jax.federated.placement import merge
from flex_jax.federated.sharding import replicated, summed
from flex_jax.federated.state import ClientState, ClientUpdate, Frozen, ServerState
from flex_jax.models.objective import response_loss


def receive(
    recipe: Recipe, server: ServerState, client: ClientState, *, round=0, learning_rate=1.0, steps: int = 1
) -> Received:
    """What one client has at hand at the beginning of a round."""
    rules = recipe.method.server
    download = {"shared": server.shared, **rules.broadcast(server.kept)}
    known, settings = rules.known(server.kept), recipe.settings
    received = Received(download, known, client, round, learning_rate, steps, settings)
    return received._replace(download=recipe.method.client.take(received))


def collections(recipe: Recipe, frozen: Frozen, server: ServerState, client: ClientState) -> dict:
    """The model's collections for one client."""
    received = receive(recipe, server, client)
    tree = merge(frozen.adapters, received.download["shared"], client.personal)
    return {"params": frozen.params, "adapters": recipe.method.compose(tree, received), "grafts": client.grafts}


def exchanged(recipe: Recipe, server: ServerState, client: ClientState) -> tuple[dict, dict]:
    """(upload, download) of one client in a round as shapes, before compression."""

    def one(server, client):
        received = receive(recipe, server, client)
        trained = recipe.method.client.begin(received, lambda tree: jnp.float32(0.0))
        return recipe.method.client.finish(received, trained).upload, received.download

    return jax.eval_shape(one, server, client)


def client_round(
    recipe: Recipe,
    received: Received,
    frozen: Frozen,
    batches: Batch,
    key: jax.Array,
    *,
    weight_decay: float,
    clip_norm: float,
    axes: tuple[str, ...] = (),
) -> ClientUpdate:
    """Train one client from what it received on batches [steps, B, S]; the mean loss of a step is over its response
    tokens. AdamW, whose moments start anew every round, behind clipping by the joint norm of all that the client
    trains; the method's rule says what is changed of that. Metrics: train_loss (nats a token) and grad_norm (before
    clipping and the method's corrections), means over steps; the bytes of what the client was sent and sends. axes: of
    the mesh, over which the rows of a batch are divided; each device draws dropout of its own."""
    rule, client, numbers = recipe.method.client, received.client, recipe.settings.client
    adamw = optax.adamw(received.learning_rate, weight_decay=weight_decay)
    optimizer = rule.optimizer(received, optax.clip_by_global_norm(clip_norm), adamw)

    def loss_on(batch, step_key):
        if axes and step_key is not None:
            step_key = jax.random.fold_in(step_key, jax.lax.axis_index(axes))

        def loss(tree):
            adapters = recipe.method.compose(merge(frozen.adapters, replicated(axes, tree)), received)
            variables = {"params": frozen.params, "adapters": adapters, "grafts": client.grafts}
            total, count = response_loss(recipe.model, variables, batch.tokens, batch.loss_mask, step_key)
            return summed(axes, total) / jnp.maximum(jax.lax.psum(count, axes), 1.0)

        return loss

    def step(carry, inputs):
        trained, opt_state = carry

        def minimised(trained):
            return rule.objective(received, trained, loss_on(*inputs))

        (_, value), gradients = jax.value_and_grad(minimised, has_aux=True)(trained)
        updates, opt_state = optimizer.update(gradients, opt_state, trained)
        return (optax.apply_updates(trained, updates), opt_state), (value, optax.tree.norm(gradients))

    step_keys = jax.random.split(key, received.steps)
    first = jax.tree.map(lambda leaf: leaf[0], batches)
    start = rule.begin(received, loss_on(first, None))
    (trained, _), (losses, norms) = jax.lax.scan(step, (start, optimizer.init(start)), (batches, step_keys))
    upload, personal, kept = rule.finish(received, trained)
    sent, residual = compress(
        upload,
        client.residual,
        jax.random.fold_in(key, received.steps),
        compression=numbers.compression,
        fraction=numbers.compression_fraction,
    )
    upload_bytes, download_bytes = rule.sent(received, sent)
    metrics = {"train_loss": losses.mean(), "grad_norm": norms.mean()}
    metrics |= {"upload_bytes": jnp.uint32(upload_bytes), "download_bytes": jnp.uint32(download_bytes)}
    return ClientUpdate(sent, ClientState(personal, client.grafts, kept, residual), metrics)
