"""A federated round: one jitted function from state and batches to state and metrics."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flex_jax.data.batches import Batch
from flex_jax.federated.client import client_round, exchanged, receive
from flex_jax.federated.method import Recipe
from flex_jax.federated.server import aggregate
from flex_jax.federated.sharding import data_axes, on_a_device, spread
from flex_jax.federated.state import Frozen, RoundState

RoundFunction = Callable[..., tuple[RoundState, dict[str, jax.Array]]]


def cosine(round, rounds: int, first: float, last: float):
    """The learning rate of a round: from `first` down towards `last` along a half cosine over the run."""
    return last + 0.5 * (first - last) * (1.0 + jnp.cos(jnp.pi * round / rounds))


def make_round(
    recipe: Recipe,
    *,
    clients: int,
    rounds: int,
    learning_rate: float,
    final_learning_rate: float,
    weight_decay: float,
    clip_norm: float,
    mesh: Mesh | None = None,
) -> RoundFunction:
    """round_fn(frozen, state, batches, cohort, num_examples) -> (state, metrics), compiled once for all rounds.

    clients: N, of the federation. frozen: see `Frozen`, one copy for all clients; state.clients: the rows of the
    cohort, leading axis C; batches: leading axes [C, steps, B, S]; cohort [C] int32, the numbers of its clients;
    num_examples [C] float32. The cohort is a `vmap` of `client_round`, and the server's update is in the same jit.
    Metrics: "clients", arrays [C], among them the bytes handed to and by each; "server", the learning rate. The state
    is donated. mesh: the devices, of which `sharding.place` puts the arguments where they belong; None for one.
    """

    def train(recipe: Recipe, axes, frozen: Frozen, server, round, rate, clients, batches: Batch, keys):
        steps = batches.tokens.shape[1]

        def one(client, own_batches, key):
            received = receive(recipe, server, client, round=round, learning_rate=rate, steps=steps)
            numbers = dict(weight_decay=weight_decay, clip_norm=clip_norm, axes=axes)
            return client_round(recipe, received, frozen, own_batches, key, **numbers)

        return jax.vmap(one)(clients, batches, keys)

    def train_over_mesh(frozen: Frozen, *arguments):
        own = recipe._replace(model=on_a_device(recipe.model, mesh, frozen.params))
        return spread(partial(train, own, data_axes(mesh)), mesh, frozen)(frozen, *arguments)

    @partial(jax.jit, donate_argnums=1)
    def round_fn(frozen: Frozen, state: RoundState, batches: Batch, cohort, num_examples):
        rate = cosine(state.round, rounds, learning_rate, final_learning_rate)
        round_key = jax.random.fold_in(state.key, state.round)
        keys = jax.vmap(partial(jax.random.fold_in, round_key))(cohort)
        train_cohort = partial(train, recipe, ()) if mesh is None else train_over_mesh
        updates = train_cohort(frozen, state.server, state.round, rate, state.clients, batches, keys)
        upload, _ = exchanged(recipe, state.server, jax.tree.map(lambda leaf: leaf[0], state.clients))
        rule, settings = recipe.method.server, recipe.settings
        server = aggregate(rule, settings, clients, upload, state.server, updates.upload, num_examples)
        new_state = RoundState(state.round + 1, server, updates.state, state.key)
        return new_state, {"clients": updates.metrics, "server": {"learning_rate": rate}}

    return round_fn
