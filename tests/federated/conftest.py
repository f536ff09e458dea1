"""A federation of four clients on a random model, ready for a round."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flex_jax.data.batches import Batch
from flex_jax.federated.round import make_round
from flex_jax.federated.rules import DEFAULTS
from flex_jax.federated.start import start
from flex_jax.methods import METHODS

N, STEPS, B, S = 4, 3, 2, 10


@pytest.fixture(scope="session")
def prepared(model, model_config, params):
    """(name, params) -> (Frozen, RoundState) of round 0."""

    def prepare(name, params=params):
        method = METHODS[name]
        chosen = np.arange(N * model_config.layers).reshape(N, model_config.layers, 1) % model_config.experts
        return start(
            model_config,
            params,
            model.adapters,
            method.placement,
            chosen if method.personal_slot else None,
            clients=N,
            key=jax.random.PRNGKey(7),
            rules=method.rules,
        )

    return prepare


@pytest.fixture(scope="session")
def batches(model_config):
    """[N, STEPS, B, S], the loss on the second half of each sequence; one row has no response at all."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model_config.vocab_size, (N, STEPS, B, S)).astype(np.int32)
    mask = np.broadcast_to(np.arange(S) >= S // 2, tokens.shape).astype(np.float32).copy()
    mask[1, 2, 0] = 0
    return Batch(tokens, mask)


@pytest.fixture(scope="session")
def examples():
    return np.array([10.0, 20.0, 30.0, 40.0], np.float32)


@pytest.fixture(scope="session")
def round_of(model):
    """name, and settings of make_round in the place of these -> round function, one for each method."""
    made = {}

    def make(name, settings=DEFAULTS, model=model, **changes):
        numbers = dict(rounds=5, learning_rate=1e-2, final_learning_rate=1e-3, weight_decay=0.1, clip_norm=1.0)
        numbers |= changes
        key = (name, settings, model, *sorted(numbers.items()))
        if key not in made:
            made[key] = make_round(model, METHODS[name].rules, settings, clients=N, **numbers)
        return made[key]

    return make


@pytest.fixture
def one_round(round_of, batches, examples):
    """(name, frozen, state, cohort) -> (state, metrics), on the cohort's own batches."""

    def run(name, frozen, state, cohort=tuple(range(N)), **changes):
        cohort = np.array(cohort, np.int32)
        own = Batch(*(leaf[cohort] for leaf in batches))
        fresh = jax.tree.map(jnp.copy, state)  # the round donates its state
        return round_of(name, **changes)(frozen, fresh, own, cohort, examples[cohort])

    return run
