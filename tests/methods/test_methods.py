"""What every method owes its users, whatever it does."""

import jax
import numpy as np
import pytest

from flex_jax.federated import round as round_module
from flex_jax.federated.client import collections
from flex_jax.federated.compression import tree_bytes
from flex_jax.federated.method import ClientSettings, ServerSettings, Settings
from flex_jax.federated.plan import plan
from flex_jax.methods import METHODS
from tests.federated.conftest import B, S
from tests.methods.test_paper_methods import RATE, assert_close

# What uploads hold beside the change of the shared tree.
BESIDE = {"scaffold": {"control"}, "fedmoe": {"expert_index"}, "fedamole": {"expert_index"}}
BESIDE |= dict.fromkeys(("flexlora", "flora", "hetlora"), {"rank"})


# (name, settings, rounds, where in its shared tree): the method is FedAvg there, as its paper says.
LIMITS = [
    ("fedit", Settings(), 2, None),
    ("fedprox", Settings(ClientSettings(proximal_mu=0.0)), 2, None),
    ("scaffold", Settings(), 1, None),  # its controls are zero in the first round
    ("fedavgm", Settings(server=ServerSettings(beta1=0.0)), 2, None),
    ("ditto", Settings(ClientSettings(ditto_lambda=50.0)), 2, "global"),  # whatever clients keep
    ("apfl", Settings(ClientSettings(mixing_alpha=0.7)), 2, "global"),
    ("fedala", Settings(ClientSettings(weight_learning_rate=0.0, personal_layers=2)), 2, "global"),  # weights of one
    ("feddpa", Settings(), 1, "global"),  # the first round trains the shared adapter only
    ("fdlora", Settings(server=ServerSettings(learning_rate=1.0, beta1=0.0)), 2, "global"),
]

each = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module")
def finished(prepared, round_of, batches, examples):
    """name -> (frozen, first state, state after a round of the clients 0 and 2, metrics), computed once."""
    done = {}

    def run(name, one_round):
        if name not in done:
            frozen, first = prepared(name)
            done[name] = (frozen, first, *one_round(name, frozen, first, cohort=(0, 2)))
        return done[name]

    return run


@each
def test_a_round_trains_and_keeps_every_structure(name, finished, one_round):
    """Contract: the state after a round can be given to the next; losses are finite and something has moved."""
    _, first, after, metrics = finished(name, one_round)
    assert jax.tree.structure(after) == jax.tree.structure(first)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(first), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    assert np.isfinite(metrics["clients"]["train_loss"]).all()
    trained = after.server, after.clients.personal
    before = first.server, first.clients.personal
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(before), strict=True))


@each
def test_the_server_is_handed_uploads_and_counts_only(name, prepared, round_of, batches, examples, monkeypatch):
    """Privacy: the arrays handed over, inspected where they are handed over; none of them is personal."""
    frozen, state = prepared(name)
    handed = []

    def spy(*arguments):
        handed.append(arguments[4:])  # after rule, numbers and shapes
        return aggregate(*arguments)

    aggregate = round_module.aggregate
    monkeypatch.setattr(round_module, "aggregate", spy)
    round_fn = round_of(name, rounds=3)  # not yet traced
    jax.eval_shape(round_fn, frozen, state, batches, np.arange(4, dtype=np.int32), examples)
    ((server, uploads, counts),) = handed
    assert jax.tree.structure(server) == jax.tree.structure(state.server)
    assert set(uploads) == {"delta"} | BESIDE.get(name, set())
    assert jax.tree.structure(uploads["delta"]) == jax.tree.structure(state.server.shared)
    assert counts.shape == (4,)


@each
def test_the_same_state_gives_the_same_bits(name, finished, one_round):
    """Determinism."""
    frozen, first, after, _ = finished(name, one_round)
    again, _ = one_round(name, frozen, first, cohort=(0, 2))
    jax.tree.map(np.testing.assert_array_equal, after, again)


@each
def test_one_compilation_serves_all_rounds(name, finished, one_round, round_of):
    frozen, _, state, _ = finished(name, one_round)
    before = round_of(name)._cache_size()
    for _ in range(2):
        state, _ = one_round(name, frozen, state, cohort=(1, 2))
    assert int(state.round) == 3
    assert round_of(name)._cache_size() - before <= 1  # arrays on the host first, then those of the device


@each
def test_planned_bytes_are_those_handed_over(name, finished, one_round, recipe_of):
    frozen, first, _, metrics = finished(name, one_round)
    planned = plan(recipe_of(name), frozen, first, cohort=2, batch=B, sequence=S)
    for way in ("upload", "download"):
        assert metrics["clients"][f"{way}_bytes"].tolist() == 2 * [getattr(planned, f"{way}_bytes")]
    assert (planned.upload_bytes == 0) == (tree_bytes(first.server.shared) == 0)


@each
def test_uploads_of_a_quarter_still_train(name, prepared, one_round):
    """Compression composes with any method."""
    settings = Settings(ClientSettings(compression="int8"))
    frozen, state = prepared(name, settings=settings)
    plain, plain_metrics = one_round(name, *prepared(name), cohort=(0, 2))
    after, metrics = one_round(name, frozen, state, cohort=(0, 2), settings=settings)
    full = plain_metrics["clients"]["upload_bytes"]
    assert (metrics["clients"]["upload_bytes"] <= 0.4 * full).all()
    for a, b in zip(jax.tree.leaves(after.server.shared), jax.tree.leaves(plain.server.shared), strict=True):
        assert np.abs(a - b).max() <= 0.05


@each
def test_every_client_has_a_model_before_and_after(name, finished, one_round, recipe_of):
    """What evaluation and export see: before the first round it is the pretrained model, up to the slot."""
    frozen, first, after, _ = finished(name, one_round)
    recipe = recipe_of(name)
    tokens = np.arange(8)[None] % recipe.model.config.vocab_size
    outputs = {}
    for state in (first, after):
        client = jax.tree.map(lambda leaf: leaf[0], state.clients)
        logits = recipe.model.apply(collections(recipe, frozen, state.server, client), tokens).logits
        outputs[int(state.round)] = np.asarray(logits)
    if METHODS[name].grafts != "own":
        pretrained = recipe.model.apply({"params": frozen.params}, tokens).logits
        np.testing.assert_allclose(outputs[0], pretrained, atol=1e-5)
    assert np.isfinite(outputs[1]).all() and np.abs(outputs[1] - outputs[0]).max() > 1e-4


@each
def test_who_takes_part_decides_what_changes(name, finished, one_round):
    """Partial participation: of two cohorts that share a client, what that one keeps is the same; what the server has
    is not, unless nothing is shared."""
    frozen, first, after, _ = finished(name, one_round)
    other, _ = one_round(name, frozen, first, cohort=(0, 3))
    for a, b in zip(jax.tree.leaves(after.clients), jax.tree.leaves(other.clients), strict=True):
        np.testing.assert_allclose(a[0], b[0], rtol=2e-5, atol=1e-6)
    differ = [(a != b).any() for a, b in zip(jax.tree.leaves(after.server), jax.tree.leaves(other.server), strict=True)]
    assert any(differ) == bool(jax.tree.leaves(first.server.shared))


@pytest.mark.parametrize(("name", "settings", "rounds", "part"), LIMITS)
def test_a_method_is_fedavg_where_its_paper_says_so(name, settings, rounds, part, prepared, one_round):
    (frozen, state), (frozen_there, there) = prepared(name, settings=settings), prepared("fedavg")
    start = there.server.shared
    for cohort in [(0, 2), (1, 3)][:rounds]:
        state, _ = one_round(name, frozen, state, cohort=cohort, settings=settings, **RATE)
        there, _ = one_round("fedavg", frozen_there, there, cohort=cohort, **RATE)
        shared = state.server.shared
        assert_close(shared[part] if part else shared, there.server.shared, start, bound=1e-5)
