"""A federated round: one jitted function from state and batches to state and metrics."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from flex_jax.data.batches import Batch
from flex_jax.federated.client import client_round, exchanged, receive
from flex_jax.federated.method import Recipe
from flex_jax.federated.server import aggregate
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
) -> RoundFunction:
    """round_fn(frozen, state, batches, cohort, num_examples) -> (state, metrics), compiled once for all rounds.

    clients: N, of the federation. frozen: see `Frozen`, one copy for all clients; state.clients: the rows of the
    cohort, leading axis C; batches: leading axes [C, steps, B, S]; cohort [C] int32, the numbers of its clients;
    num_examples [C] float32. The cohort is a `vmap` of `client_round`, and the server's update is in the same jit.
    Metrics: "clients", arrays [C], among them the bytes handed to and by each; "server", the learning rate. The state
    is donated.
    """

    @partial(jax.jit, donate_argnums=1)
    def round_fn(frozen: Frozen, state: RoundState, batches: Batch, cohort, num_examples):
        rate = cosine(state.round, rounds, learning_rate, final_learning_rate)
        round_key = jax.random.fold_in(state.key, state.round)
        keys = jax.vmap(partial(jax.random.fold_in, round_key))(cohort)
        steps = batches.tokens.shape[1]

        def train(client, own_batches, key):
            received = receive(recipe, state.server, client, round=state.round, learning_rate=rate, steps=steps)
            return client_round(
                recipe, received, frozen, own_batches, key, weight_decay=weight_decay, clip_norm=clip_norm
            )

        updates = jax.vmap(train)(state.clients, batches, keys)
        upload, _ = exchanged(recipe, state.server, jax.tree.map(lambda leaf: leaf[0], state.clients))
        rule, settings = recipe.method.server, recipe.settings
        server = aggregate(rule, settings, clients, upload, state.server, updates.upload, num_examples)
        new_state = RoundState(state.round + 1, server, updates.state, state.key)
        return new_state, {"clients": updates.metrics, "server": {"learning_rate": rate}}

    return round_fn
