"""The baselines of the paper: written out by hand over rounds, and equal to FedAvg where their papers say so."""

from functools import partial

import jax
import numpy as np
import optax
import pytest

from flex_jax.federated.aggregation import weighted_mean
from flex_jax.federated.method import Arrived, ClientSettings, ServerSettings, Settings
from flex_jax.methods import METHODS
from flex_jax.models.objective import response_loss

RATE = {"learning_rate": 1e-2, "final_learning_rate": 1e-2}  # the same in every round
tree_map = jax.tree.map


def assert_close(ours, expected, start, bound=2e-4):
    """Relative to the distance moved since `start`."""
    difference = optax.tree.norm(tree_map(np.subtract, ours, expected))
    moved = optax.tree.norm(tree_map(np.subtract, expected, start))
    assert moved > 1e-3 and difference <= bound * moved, (difference, moved)


@partial(jax.jit, static_argnums=0)
def gradient(model, params, shared, tokens, mask):
    def loss(shared):
        total, count = response_loss(model, {"params": params, "adapters": shared}, tokens, mask)
        return total / count

    return jax.grad(loss)(shared)


def plain_client(model, params, shared, data, pull=None, drift=None):
    """Local steps on one client as a Python loop. pull: (mu, w_t) of FedProx; drift: c - c_i of SCAFFOLD."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1))
    opt_state, start = optimizer.init(shared), shared
    for tokens, mask in zip(*data, strict=True):
        g = gradient(model, params, shared, tokens, mask)
        if pull is not None:
            g = tree_map(lambda g, w, w_t: g + pull * (w - w_t), g, shared, start)
        updates, opt_state = optimizer.update(g, opt_state, shared)
        shared = optax.apply_updates(shared, updates)
        if drift is not None:
            shared = tree_map(lambda w, d: w - 1e-2 * d, shared, drift)
    return shared


def mean(trees, weights):
    return tree_map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *trees)


def rounds(name, prepared, one_round, cohorts, **changes):
    """(frozen, first state, states after each round of these cohorts)."""
    frozen, first = prepared(name)
    states, state = [], first
    for cohort in cohorts:
        state, _ = one_round(name, frozen, state, cohort=cohort, **RATE, **changes)
        states.append(state)
    return frozen, first, states


def test_fedprox_pulls_every_step_back_to_the_received_weights(prepared, one_round, model, params, batches, examples):
    settings = Settings(ClientSettings(proximal_mu=3.0))
    _, first, (after,) = rounds("fedprox", prepared, one_round, [(0, 2)], settings=settings)
    shared = first.server.shared
    trained = [plain_client(model, params, shared, [leaf[c] for leaf in batches], pull=3.0) for c in (0, 2)]
    weights = examples[[0, 2]] / examples[[0, 2]].sum()
    assert_close(after.server.shared, mean(trained, weights), shared)
    free = [plain_client(model, params, shared, [leaf[c] for leaf in batches]) for c in (0, 2)]
    with pytest.raises(AssertionError):
        assert_close(after.server.shared, mean(free, weights), shared)


def test_scaffold_over_three_rounds_of_changing_cohorts(prepared, one_round, model, params, batches, examples):
    cohorts = [(0, 2), (1, 2), (0, 3)]
    _, first, states = rounds("scaffold", prepared, one_round, cohorts)
    x = first.server.shared
    zero = tree_map(np.zeros_like, x)
    c, own = zero, [zero] * 4
    steps = batches.tokens.shape[1]
    for cohort, state in zip(cohorts, states, strict=True):
        trained, changes = [], []
        for i in cohort:
            drift = tree_map(np.subtract, c, own[i])
            y = plain_client(model, params, x, [leaf[i] for leaf in batches], drift=drift)
            new = tree_map(lambda c_i, c, x, y: c_i - c + (x - y) / (steps * 1e-2), own[i], c, x, y)
            changes.append(tree_map(np.subtract, new, own[i]))
            own[i] = new
            trained.append(y)
        weights = examples[list(cohort)] / examples[list(cohort)].sum()
        x = mean(trained, weights)
        c = tree_map(lambda c, *changed: c + sum(changed) / 4, c, *changes)
        assert_close(state.server.shared, x, first.server.shared)
        assert_close(state.server.kept["control"], c, zero, bound=1e-3)
    for i in range(4):
        kept = tree_map(lambda leaf, i=i: leaf[i], states[-1].clients.kept["control"])
        assert_close(kept, own[i], zero, bound=1e-3)


SECOND_MOMENTS = {
    "fedadagrad": lambda v, square: v + square,
    "fedadam": lambda v, square: 0.8 * v + 0.2 * square,
    "fedyogi": lambda v, square: v - 0.2 * square * np.sign(v - square),
}


@pytest.mark.parametrize("name", ["fedavgm", *SECOND_MOMENTS])
def test_server_optimisers_over_four_rounds(name):
    """Reddi et al., algorithm 2, on one number a client, in NumPy."""
    settings = Settings(server=ServerSettings(learning_rate=0.3, tau=0.05, beta1=0.6, beta2=0.8))
    rule, rng = METHODS[name].server, np.random.default_rng(0)
    shares = np.array([0.2, 0.3, 0.5], np.float32)
    shared = {"w": np.float32(1.0)}
    kept = rule.init(shared, settings, None)
    w, m, v = 1.0, 0.0, 0.05**2
    for number in range(4):
        deltas = rng.normal(size=3).astype(np.float32)
        uploads = {"delta": {"w": deltas}}
        arrived = Arrived(uploads, shares, partial(weighted_mean, weights=shares), 3, settings)
        shared, kept = rule.update(shared, kept, arrived)
        delta = float(shares @ deltas)
        m = delta if number == 0 or name == "fedadagrad" else 0.6 * m + 0.4 * delta
        if name == "fedavgm":
            w += m
        else:
            v = SECOND_MOMENTS[name](v, m * m)
            w += 0.3 * m / (np.sqrt(v) + 0.05)
        np.testing.assert_allclose(shared["w"], w, rtol=1e-5)


def test_clients_weigh_alike_where_that_is_asked_for(prepared, one_round, model, params, batches):
    settings = Settings(server=ServerSettings(weighting="uniform"))
    _, first, (after,) = rounds("fedavg", prepared, one_round, [(0, 3)], settings=settings)
    shared = first.server.shared
    trained = [plain_client(model, params, shared, [leaf[c] for leaf in batches]) for c in (0, 3)]
    assert_close(after.server.shared, mean(trained, (0.5, 0.5)), shared)
