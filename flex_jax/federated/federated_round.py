"""A federated round: one jitted function from state and batches to state and metrics."""

import time
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flex_jax.data.batches import Batch
from flex_jax.federated.client import (
    LocalTraining,
    OptimizerSettings,
    client_context,
    client_round,
    exchanged,
    is_finite,
)
from flex_jax.federated.cohort_sharding import shard_cohort
from flex_jax.federated.method import MethodSpec
from flex_jax.federated.server import aggregate
from flex_jax.federated.state import Frozen, RoundInputs, RoundState
from flex_jax.models.sharding import data_axes, shard_model


class RoundFunction(Protocol):
    """A jitted round, called with `RoundInputs`: returns the state after it, and its metrics (see `make_round`)."""

    def __call__(
        self, frozen: Frozen, state: RoundState, batches: Batch, cohort: Any, num_examples: Any
    ) -> tuple[RoundState, dict[str, dict]]: ...

    def lower(self, *args: Any) -> Any: ...


def cosine(round, settings: OptimizerSettings):
    """Returns the learning rate of a round: a half cosine over the run, from the first towards the final one."""
    first, final = settings.learning_rate, settings.final_learning_rate
    return final + 0.5 * (first - final) * (1.0 + jnp.cos(jnp.pi * round / settings.num_rounds))


def make_round(
    spec: MethodSpec, *, num_clients: int, optimizer: OptimizerSettings, mesh: Mesh | None = None
) -> RoundFunction:
    """Returns a jitted round_fn(*RoundInputs) -> (state, metrics). One compilation serves all rounds.

    The cohort is a `vmap` of `client_round`, and the server's update is in the same jit. The state is donated.
    metrics["clients"] has arrays [C], and the `ByteCount` of upload and download; metrics["server"] has the learning
    rate. Both have `finite`. The server leaves out a client whose upload, state or loss is not finite, and the caller
    has to replace its new state. `num_clients` is N, that of the federation. `cohort_sharding.place` puts the inputs on
    the devices of a mesh.
    """

    def train_cohort(training: LocalTraining, inputs: RoundInputs, learning_rate, keys):
        frozen, state, batches, *_ = inputs

        def train_client(client, client_batches, key):
            num_steps = batches.tokens.shape[1]
            context = client_context(training.spec, state.server, client, state.round, learning_rate, num_steps)
            return client_round(training, frozen, context, client_batches, key)

        return jax.vmap(train_client)(state.clients, batches, keys)

    def train_over_mesh(mesh: Mesh, inputs: RoundInputs, learning_rate, keys):
        model = shard_model(spec.model, mesh, inputs.frozen.params)
        training = LocalTraining(spec._replace(model=model), optimizer, data_axes(mesh))
        return shard_cohort(partial(train_cohort, training), mesh, inputs, learning_rate, keys)

    @partial(jax.jit, donate_argnums=1)
    def round_fn(frozen: Frozen, state: RoundState, batches: Batch, cohort, num_examples):
        inputs = RoundInputs(frozen, state, batches, cohort, num_examples)
        learning_rate = cosine(state.round, optimizer)
        round_key = jax.random.fold_in(state.key, state.round)
        keys = jax.vmap(partial(jax.random.fold_in, round_key))(cohort)
        if mesh is None:
            client_updates = train_cohort(LocalTraining(spec, optimizer), inputs, learning_rate, keys)
        else:
            client_updates = train_over_mesh(mesh, inputs, learning_rate, keys)
        upload_shapes, _ = exchanged(spec, state.server, jax.tree.map(lambda leaf: leaf[0], state.clients))
        counted = jnp.where(client_updates.metrics["finite"], num_examples, 0)
        server = aggregate(spec, num_clients, upload_shapes, state.server, client_updates.upload, counted)
        new_state = RoundState(state.round + 1, server, client_updates.state, state.key)
        server_metrics = {"learning_rate": learning_rate, "finite": is_finite((server, learning_rate))}
        return new_state, {"clients": client_updates.metrics, "server": server_metrics}

    return round_fn


class CompiledRound:
    """A round function that is compiled once, for all rounds and seeds of a method."""

    def __init__(self, round_fn: RoundFunction):
        self._round_fn = round_fn
        self._compiled = None

    def compile(self, inputs: RoundInputs) -> float:
        """Compiles the function for inputs of these shapes, if it is not compiled. Returns the seconds that took."""
        if self._compiled is not None:
            return 0.0
        started = time.perf_counter()
        self._compiled = self._round_fn.lower(*inputs).compile()
        return time.perf_counter() - started

    def __call__(self, inputs: RoundInputs) -> tuple[RoundState, dict[str, dict]]:
        assert self._compiled is not None, "compile first"
        return self._compiled(*inputs)
