"""One client's round, a scan over local steps, and the client's model at any time."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flex_jax.data.batches import Batch
from flex_jax.federated.cohort_sharding import sum_gradients_over, sum_over
from flex_jax.federated.compression import compress
from flex_jax.federated.method import ClientContext, Download, Loss, MethodSpec, Upload
from flex_jax.federated.ownership import merge
from flex_jax.federated.state import ClientState, ClientUpdate, Frozen, ServerState
from flex_jax.models.objective import response_loss


class OptimizerSettings(NamedTuple):
    """The clients' AdamW. Its learning rate falls along a cosine over the rounds."""

    num_rounds: int
    learning_rate: float  # of the first round
    final_learning_rate: float  # that the cosine approaches
    weight_decay: float = 0.0
    clip_norm: float = 1.0


class LocalTraining(NamedTuple):
    """What is static about a client's round."""

    spec: MethodSpec
    optimizer: OptimizerSettings
    axes: tuple[str, ...] = ()  # mesh axes that divide the rows of a client's batch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClientModels:
    """The models of C clients, or the aggregated model as the only one: everything that makes them answer."""

    spec: MethodSpec = field(metadata={"static": True})
    frozen: Frozen
    server: ServerState
    clients: ClientState  # leading axis C

    def variables(self, client: ClientState) -> dict:
        """Returns the Flax collections of one client's model; `client` has no axis C."""
        return client_variables(self.spec, self.frozen, self.server, client)


def from_server(spec: MethodSpec, server: ServerState, client: ClientState) -> tuple[Download, dict]:
    """Returns what one client downloads, and the server's state that it has from earlier downloads."""
    visibility = spec.method.server.extra_visibility
    offered = Download(server.shared, server.extra if visibility == "broadcast" else {})
    replicated = server.extra if visibility == "replicated" else {}
    return spec.method.client.select_download(offered, client), replicated


def client_context(
    spec: MethodSpec, server: ServerState, client: ClientState, round, learning_rate, num_steps: int
) -> ClientContext:
    """Returns what one client has at the start of a round."""
    download, replicated = from_server(spec, server, client)
    return ClientContext(download, replicated, client, round, learning_rate, num_steps)


def client_variables(spec: MethodSpec, frozen: Frozen, server: ServerState, client: ClientState) -> dict:
    """Returns the Flax collections of one client's model."""
    download, replicated = from_server(spec, server, client)
    adapters = spec.method.compose(merge(frozen.adapters, download.shared, client.personal), client.extra, replicated)
    return {"params": frozen.params, "adapters": adapters, "grafts": client.grafts}


def exchanged(spec: MethodSpec, server: ServerState, client: ClientState) -> tuple[Upload, Download]:
    """Returns the upload, before compression, and the download of one client, as shapes."""

    def one(server, client):
        context = client_context(spec, server, client, 0, 1.0, 1)  # shapes are the same in every round
        trained = spec.method.client.init_trained(context, lambda tree: jnp.float32(0.0))
        return spec.method.client.make_result(context, trained).upload, context.download

    return jax.eval_shape(one, server, client)


def client_round(
    training: LocalTraining, frozen: Frozen, context: ClientContext, batches: Batch, key: jax.Array
) -> ClientUpdate:
    """Trains one client on batches [steps, B, S].

    A step minimises the method's objective, by default the mean loss over response tokens. The optimizer is AdamW after
    clipping by the joint norm of everything that the client trains, unless the method changes it; its moments start
    from zero in every round. On a mesh each device draws its own dropout.

    The metrics train_loss (nats per token) and grad_norm (before clipping and the method's corrections) are means over
    steps; upload_bytes and download_bytes are `ByteCount`; finite says whether upload, new state and losses are.
    """
    (spec, settings, axes), client = training, context.state
    rule = spec.method.client
    adamw = optax.adamw(context.learning_rate, weight_decay=settings.weight_decay)
    optimizer = rule.optimizer(context, optax.clip_by_global_norm(settings.clip_norm), adamw)

    def loss_on(batch, step_key) -> Loss:
        if axes and step_key is not None:
            step_key = jax.random.fold_in(step_key, jax.lax.axis_index(axes))

        def loss(tree):
            tree = merge(frozen.adapters, sum_gradients_over(axes, tree))
            adapters = spec.method.compose(tree, client.extra, context.replicated)
            variables = {"params": frozen.params, "adapters": adapters, "grafts": client.grafts}
            total, count = response_loss(spec.model, variables, batch.tokens, batch.loss_mask, step_key)
            summed_loss: Any = sum_over(axes, total)
            return summed_loss / jnp.maximum(jax.lax.psum(count, axes), 1.0)

        return loss

    def step(carry, inputs):
        trained, opt_state = carry

        def minimised(trained):
            return rule.objective(context, trained, loss_on(*inputs))

        (_, value), gradients = jax.value_and_grad(minimised, has_aux=True)(trained)
        updates, opt_state = optimizer.update(gradients, opt_state, trained)
        return (optax.apply_updates(trained, updates), opt_state), (value, optax.tree.norm(gradients))

    step_keys = jax.random.split(key, context.num_steps)
    first_batch = jax.tree.map(lambda leaf: leaf[0], batches)
    trained: Any = rule.init_trained(context, loss_on(first_batch, None))  # without a key there is no dropout
    (trained, _), (losses, norms) = jax.lax.scan(step, (trained, optimizer.init(trained)), (batches, step_keys))
    result = rule.make_result(context, trained)
    packed, residual = compress(
        result.upload,
        client.residual,
        jax.random.fold_in(key, context.num_steps),
        compression=spec.settings.compression,
        fraction=spec.settings.compression_fraction,
    )
    upload_bytes, download_bytes = rule.wire_bytes(context, packed)
    metrics = {"train_loss": losses.mean(), "grad_norm": norms.mean()}
    metrics |= {"upload_bytes": upload_bytes, "download_bytes": download_bytes}
    update = ClientUpdate(packed, ClientState(result.personal, client.grafts, result.extra, residual), metrics)
    return update._replace(metrics=metrics | {"finite": is_finite((update.upload, update.state, losses))})


def is_finite(tree: Any) -> jax.Array:
    """Whether no leaf of a tree has a NaN or an infinity, bool []."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
