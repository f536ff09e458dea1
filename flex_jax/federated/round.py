"""A federated round: one jitted function from state and batches to state and metrics."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from flex_jax.data.batches import Batch
from flex_jax.federated.client import client_round
from flex_jax.federated.plan import size
from flex_jax.federated.rules import Received, Rules, Settings
from flex_jax.federated.server import aggregate
from flex_jax.federated.state import Frozen, RoundState
from flex_jax.models.decoder import Decoder

RoundFunction = Callable[..., tuple[RoundState, dict[str, jax.Array]]]


def cosine(round, rounds: int, first: float, last: float):
    """The learning rate of a round: from `first` down towards `last` along a half cosine over the run."""
    return last + 0.5 * (first - last) * (1.0 + jnp.cos(jnp.pi * round / rounds))


def make_round(
    model: Decoder,
    rules: Rules,
    settings: Settings,
    *,
    clients: int,
    rounds: int,
    learning_rate: float,
    final_learning_rate: float,
    weight_decay: float,
    clip_norm: float,
) -> RoundFunction:
    """round_fn(frozen, state, batches, cohort, num_examples) -> (state, metrics), compiled once for all rounds.

    clients: N, of the federation. frozen: see `Frozen`, one copy for all clients; batches: leading axes
    [C, steps, B, S]; cohort [C] int32, the rows of `state.clients` that take part; num_examples [C] float32. The cohort
    is a `vmap` of `client_round`, and the server's update is in the same jit. Metrics: "clients", arrays [C]; "server",
    the learning rate and the bytes handed to and by each client. The state is donated.
    """

    @partial(jax.jit, donate_argnums=1)
    def round_fn(frozen: Frozen, state: RoundState, batches: Batch, cohort, num_examples):
        rate = cosine(state.round, rounds, learning_rate, final_learning_rate)
        download = {"shared": state.server.shared, **rules.server.broadcast(state.server.kept)}
        round_key = jax.random.fold_in(state.key, state.round)
        keys = jax.vmap(partial(jax.random.fold_in, round_key))(cohort)
        taking_part = jax.tree.map(lambda leaf: leaf[cohort], state.clients)

        def train(own, own_batches, key):
            received = Received(download, own.kept, rate, own_batches.tokens.shape[0], settings)
            arguments = received, frozen, own, own_batches, key
            return client_round(model, rules.client, *arguments, weight_decay=weight_decay, clip_norm=clip_norm)

        updates = jax.vmap(train)(taking_part, batches, keys)
        server = aggregate(rules.server, settings, clients, state.server, updates.upload, num_examples)
        everyone = jax.tree.map(lambda leaf, rows: leaf.at[cohort].set(rows), state.clients, updates.state)
        new_state = RoundState(state.round + 1, server, everyone, state.key)
        sent = {
            "upload_bytes": jnp.uint32(size(updates.upload) // cohort.shape[0]),
            "download_bytes": jnp.uint32(size(download)),
        }
        return new_state, {"clients": updates.metrics, "server": sent | {"learning_rate": rate}}

    return round_fn
