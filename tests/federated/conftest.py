"""A federation of four clients on a random model, ready for a round."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flex_jax.data.batches import Batch
from flex_jax.federated.method import DEFAULTS, Recipe
from flex_jax.federated.round import make_round
from flex_jax.federated.start import start
from flex_jax.methods import METHODS

N, STEPS, B, S = 4, 3, 2, 10


@pytest.fixture(scope="session")
def recipe_of(model):
    """(name, settings, model) -> Recipe."""

    def make(name, settings=DEFAULTS, model=model):
        method = METHODS[name]
        if method.grafts == "all":
            adapters = model.adapters
            model = model.clone(adapters=replace(adapters, slot=replace(adapters.slot, gate="routing")))
        return Recipe(model, method, settings)

    return make


@pytest.fixture(scope="session")
def prepared(recipe_of, params):
    """(name, params, settings) -> (Frozen, RoundState) of round 0, with the rows of all clients."""

    def prepare(name, params=params, settings=DEFAULTS):
        recipe = recipe_of(name, settings)
        config = recipe.model.config
        chosen = np.arange(N * config.layers).reshape(N, config.layers, 1) % config.experts
        frozen, state, clients = start(recipe, params, chosen, key=jax.random.PRNGKey(7))
        return frozen, state._replace(clients=clients(np.arange(N)))

    return prepare


@pytest.fixture(scope="session")
def batches(model_config):
    """[N, STEPS, B, S], the loss on the second half of each sequence; one row has no response at all.

    Of a seed in which no entry has a gradient of rounding size, which Adam would move as far as all others.
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
def round_of(recipe_of):
    """name, and settings of make_round in the place of these -> round function, one for each method."""
    made = {}

    def make(name, settings=DEFAULTS, **changes):
        numbers = dict(rounds=5, learning_rate=1e-2, final_learning_rate=1e-3, weight_decay=0.1, clip_norm=1.0)
        numbers |= changes
        key = (name, settings, *sorted(numbers.items()))
        if key not in made:
            made[key] = make_round(recipe_of(name, settings), clients=N, **numbers)
        return made[key]

    return make


@pytest.fixture
def one_round(round_of, batches, examples):
    """(name, frozen, state, cohort) -> (state, metrics), on the cohort's own batches; the state has all clients."""

    def run(name, frozen, state, cohort=tuple(range(N)), **changes):
        cohort = np.array(cohort, np.int32)
        own = Batch(*(leaf[cohort] for leaf in batches))
        # A copy: the round donates its state.
        rows = state._replace(clients=jax.tree.map(lambda leaf: leaf[cohort], state.clients))
        after, metrics = round_of(name, **changes)(frozen, jax.tree.map(jnp.copy, rows), own, cohort, examples[cohort])
        everyone = jax.tree.map(lambda leaf, new: leaf.at[cohort].set(new), state.clients, after.clients)
        return after._replace(clients=everyone), metrics

    return run
