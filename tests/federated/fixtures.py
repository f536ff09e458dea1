"""A federation of four clients on a random model, ready for a round. Each folder's conftest imports these fixtures."""

from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flex_jax.data.batches import Batch
from flex_jax.federated.client import OptimizerSettings
from flex_jax.federated.federated_round import make_round
from flex_jax.federated.init import start
from flex_jax.federated.method import MethodSpec, Settings
from flex_jax.federated.state import RoundInputs
from flex_jax.methods import make_method
from tests.federated.helpers import CONSTANT_RATE, STEPS, B, N, S, of_client

OPTIMIZER = OptimizerSettings(
    num_rounds=5, learning_rate=1e-2, final_learning_rate=1e-3, weight_decay=0.1, clip_norm=1.0
)

NO_SETTINGS = Settings()  # the defaults


class Rounds(NamedTuple):
    """Some rounds of a method."""

    frozen: Any
    first: Any  # the state before them
    states: list  # after each
    metrics: list


@pytest.fixture(scope="session")
def spec_of(model):
    """(name, hyperparameters, settings) -> MethodSpec. Equal calls return equal specs."""

    def make(name, hparams=None, settings=NO_SETTINGS):
        method, adapters = make_method(name, hparams), model.adapters
        slot = replace(adapters.slot, gate="routing") if method.grafts == "all" else adapters.slot
        adapters = replace(adapters, slot=slot, projection=method.projection)
        return MethodSpec(model.clone(adapters=adapters), method, settings)

    return make


def prepare(spec, params):
    """Returns (Frozen, RoundState) of round 0, with the states of all clients."""
    config = spec.model.config
    grafted = np.arange(N * config.num_layers).reshape(N, config.num_layers, 1) % config.num_experts
    frozen, state, init_clients = start(spec, params, grafted, key=jax.random.PRNGKey(7))
    return frozen, state._replace(clients=init_clients(np.arange(N)))


@pytest.fixture(scope="session")
def prepared(params):
    """spec -> the result of `prepare`, made once. A round donates its state, so give it a copy."""
    return cache(partial(prepare, params=params))


@pytest.fixture(scope="session")
def abstract(params):
    """spec -> the shapes of the result of `prepare`, without any compilation."""
    return lambda spec: jax.eval_shape(partial(prepare, spec), params)


@pytest.fixture(scope="session")
def batches(model_config):
    """[N, STEPS, B, S], the loss on the second half of each sequence; one row has no response at all.

    The seed is one with which no entry has a gradient of rounding size, which Adam would move as far as all others.
    """
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, model_config.vocab_size, (N, STEPS, B, S)).astype(np.int32)
    mask = np.broadcast_to(np.arange(S) >= S // 2, tokens.shape).astype(np.float32).copy()
    mask[1, 2, 0] = 0
    return Batch(tokens, mask)


@pytest.fixture(scope="session")
def examples():
    return np.array([10.0, 20.0, 30.0, 40.0], np.float32)


@pytest.fixture(scope="session")
def round_of():
    """(spec, changes of OPTIMIZER) -> round function, made once for equal arguments."""
    made = {}

    def make(spec, **changes):
        optimizer = OPTIMIZER._replace(**changes)
        if (spec, optimizer) not in made:
            made[spec, optimizer] = make_round(spec, num_clients=N, optimizer=optimizer)
        return made[spec, optimizer]

    return make


@pytest.fixture(scope="session")
def one_round(round_of, batches, examples):
    """(spec, frozen, state, cohort) -> (state, metrics), on the cohort's own batches; the state has all clients."""

    def run(spec, frozen, state, cohort=tuple(range(N)), **changes):
        cohort = np.array(cohort, np.int32)
        before = jax.tree.map(jnp.copy, state._replace(clients=of_client(state.clients, cohort)))  # it is donated
        inputs = RoundInputs(frozen, before, Batch(*of_client(tuple(batches), cohort)), cohort, examples[cohort])
        after, metrics = round_of(spec, **changes)(*inputs)
        everyone = jax.tree.map(lambda leaf, new: leaf.at[cohort].set(new), state.clients, after.clients)
        return after._replace(clients=everyone), metrics

    return run


@pytest.fixture(scope="session")
def run_rounds(prepared, one_round):
    """(spec, cohorts) -> Rounds of these cohorts, at a constant learning rate."""

    def run(spec, cohorts):
        frozen, first = prepared(spec)
        states, metrics, state = [], [], first
        for cohort in cohorts:
            state, measured = one_round(spec, frozen, state, cohort=cohort, **CONSTANT_RATE)
            states.append(state)
            metrics.append(measured)
        return Rounds(frozen, first, states, metrics)

    return run
