"""What every method owes its users, whatever it does."""

import jax
import numpy as np
import pytest

from flex_jax.federated import federated_round
from flex_jax.federated.client import client_variables
from flex_jax.federated.compression import tree_bytes
from flex_jax.federated.cost_model import StepShape, plan
from flex_jax.federated.federated_round import make_round
from flex_jax.federated.method import Settings
from flex_jax.methods import METHODS
from tests.federated.fixtures import OPTIMIZER
from tests.federated.helpers import CONSTANT_RATE, B, N, S, assert_close, assert_equal, of_client

# What uploads have in addition to the change of the shared tree.
EXTRA = {"scaffold": {"control"}, "fedmoe": {"expert_index"}, "fedamole": {"expert_index"}}
EXTRA |= dict.fromkeys(("flexlora", "flora", "hetlora"), {"rank"})


# (name, hyperparameters, rounds, where in its shared tree): the method is FedAvg there, as its paper says.
LIMITS = [
    ("fedit", {}, 2, None),
    ("fedprox", {"mu": 0.0}, 2, None),
    ("scaffold", {}, 1, None),  # its controls are zero in the first round
    ("fedavgm", {"beta1": 0.0}, 2, None),
    ("ditto", {"lambda_": 50.0}, 2, "global"),  # whatever clients have
    ("apfl", {"alpha": 0.7}, 2, "global"),
    ("fedala", {"eta": 0.0, "personal_layers": 2}, 2, "global"),  # weights of one
    ("feddpa", {}, 1, "global"),  # the first round trains the shared adapter only
    ("fdlora", {"eta": 1.0, "beta1": 0.0}, 2, "global"),
]

each = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module")
def finished(prepared, one_round, spec_of):
    """name -> (frozen, first state, state after a round of the clients 0 and 2, metrics), computed once."""
    done = {}

    def run(name):
        if name not in done:
            frozen, first = prepared(spec_of(name))
            done[name] = (frozen, first, *one_round(spec_of(name), frozen, first, cohort=(0, 2)))
        return done[name]

    return run


@each
def test_a_round_trains_and_keeps_every_structure(name, finished):
    """Contract: the state after a round can be given to the next; losses are finite and something has moved."""
    _, first, after, metrics = finished(name)
    assert jax.tree.structure(after) == jax.tree.structure(first)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(first), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    assert np.isfinite(metrics["clients"]["train_loss"]).all()
    trained = after.server, after.clients.personal
    before = first.server, first.clients.personal
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(before), strict=True))


@each
def test_the_server_is_handed_uploads_and_counts_only(name, prepared, spec_of, batches, examples, monkeypatch):
    """Privacy: the arrays handed over, inspected where they are handed over; none of them is personal."""
    spec = spec_of(name)
    frozen, state = prepared(spec)
    handed = []

    def spy(*arguments):
        handed.append(arguments[3:])  # after what is static and the shapes
        return aggregate(*arguments)

    aggregate = federated_round.aggregate
    monkeypatch.setattr(federated_round, "aggregate", spy)
    round_fn = make_round(spec, num_clients=N, optimizer=OPTIMIZER)
    jax.eval_shape(round_fn, frozen, state, batches, np.arange(N, dtype=np.int32), examples)
    ((server, uploads, counts),) = handed
    assert jax.tree.structure(server) == jax.tree.structure(state.server)
    assert set(uploads.extra) == EXTRA.get(name, set())
    assert jax.tree.structure(uploads.delta) == jax.tree.structure(state.server.shared)
    assert counts.shape == (N,)


@each
def test_the_same_state_gives_the_same_bits(name, finished, one_round, spec_of):
    """Determinism."""
    frozen, first, after, _ = finished(name)
    again, _ = one_round(spec_of(name), frozen, first, cohort=(0, 2))
    assert_equal(after, again)


@each
def test_one_compilation_serves_all_rounds(name, finished, one_round, spec_of, round_of):
    frozen, _, state, _ = finished(name)
    before = round_of(spec_of(name))._cache_size()
    for _ in range(2):
        state, _ = one_round(spec_of(name), frozen, state, cohort=(1, 2))
    assert int(state.round) == 3
    assert round_of(spec_of(name))._cache_size() - before <= 1  # arrays on the host first, then those of the device


@each
def test_planned_bytes_are_those_handed_over(name, finished, spec_of):
    frozen, first, _, metrics = finished(name)
    planned = plan(spec_of(name), frozen, first, StepShape(clients=2, batch_size=B, sequence_length=S))
    for way in ("upload", "download"):
        assert metrics["clients"][f"{way}_bytes"].tolist() == 2 * [getattr(planned, f"{way}_bytes")]
    assert (planned.upload_bytes == 0) == (tree_bytes(first.server.shared) == 0)


@each
def test_uploads_of_a_quarter_still_train(name, finished, prepared, one_round, spec_of):
    """Compression composes with any method."""
    spec = spec_of(name, settings=Settings(compression="int8"))
    _, _, plain, plain_metrics = finished(name)
    after, metrics = one_round(spec, *prepared(spec), cohort=(0, 2))
    compressed, full = (m["clients"]["upload_bytes"].tolist() for m in (metrics, plain_metrics))
    assert all(ours <= 0.4 * theirs for ours, theirs in zip(compressed, full, strict=True))
    for a, b in zip(jax.tree.leaves(after.server.shared), jax.tree.leaves(plain.server.shared), strict=True):
        assert np.abs(a - b).max() <= 0.05


@each
def test_every_client_has_a_model_before_and_after(name, finished, spec_of):
    """What evaluation and export see: before the first round it is the pretrained model, up to the slot."""
    frozen, first, after, _ = finished(name)
    spec = spec_of(name)
    tokens = np.arange(8)[None] % spec.model.config.vocab_size
    outputs = {}
    for state in (first, after):
        variables = client_variables(spec, frozen, state.server, of_client(state.clients, 0))
        outputs[int(state.round)] = np.asarray(spec.model.apply(variables, tokens).logits)
    if spec.method.grafts != "client":
        pretrained = spec.model.apply({"params": frozen.params}, tokens).logits
        np.testing.assert_allclose(outputs[0], pretrained, atol=1e-5)
    assert np.isfinite(outputs[1]).all() and np.abs(outputs[1] - outputs[0]).max() > 1e-4


@each
def test_who_takes_part_decides_what_changes(name, finished, one_round, spec_of):
    """Partial participation: two cohorts share a client.

    The state of that client is the same after both. The server's state is not, unless nothing is shared.
    """
    frozen, first, after, _ = finished(name)
    other, _ = one_round(spec_of(name), frozen, first, cohort=(0, 3))
    for a, b in zip(jax.tree.leaves(after.clients), jax.tree.leaves(other.clients), strict=True):
        np.testing.assert_allclose(a[0], b[0], rtol=2e-5, atol=1e-6)
    differ = [(a != b).any() for a, b in zip(jax.tree.leaves(after.server), jax.tree.leaves(other.server), strict=True)]
    assert any(differ) == bool(jax.tree.leaves(first.server.shared))


@pytest.mark.parametrize(("name", "hparams", "rounds", "part"), LIMITS)
def test_a_method_is_fedavg_where_its_paper_says_so(name, hparams, rounds, part, prepared, one_round, spec_of):
    spec, fedavg = spec_of(name, hparams), spec_of("fedavg")
    (frozen, state), (frozen_there, there) = prepared(spec), prepared(fedavg)
    start = there.server.shared
    for cohort in [(0, 2), (1, 3)][:rounds]:
        state, _ = one_round(spec, frozen, state, cohort=cohort, **CONSTANT_RATE)
        there, _ = one_round(fedavg, frozen_there, there, cohort=cohort, **CONSTANT_RATE)
        shared = state.server.shared
        assert_close(shared[part] if part else shared, there.server.shared, start, bound=1e-5)
