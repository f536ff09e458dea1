"""The baselines of the paper: written out by hand over rounds."""

from functools import partial

import numpy as np
import pytest

from flex_jax.federated.aggregation import weighted_mean
from flex_jax.federated.method import ServerContext, Settings, Upload
from flex_jax.federated.state import ServerState
from flex_jax.methods import make_method
from tests.federated.helpers import (
    LEARNING_RATE,
    STEPS,
    N,
    assert_close,
    gradient,
    mean,
    of_client,
    plain_client,
    shares,
    train,
    tree_map,
)


def pulled_client(model, params, w_t, data, mu):
    """A client of FedProx."""

    def pulled(w, tokens, mask):
        return tree_map(lambda g, w, w_t: g + mu * (w - w_t), gradient(model, params, w, tokens, mask), w, w_t)

    return train(w_t, pulled, zip(*data, strict=True))


def test_fedprox_pulls_every_step_back_to_the_downloaded_weights(run_rounds, spec_of, model, params, batches, examples):
    cohort = (0, 2)
    _, first, (after,), _ = run_rounds(spec_of("fedprox", {"mu": 3.0}), [cohort])
    shared, weights = first.server.shared, shares(examples, cohort)
    pulled = [pulled_client(model, params, shared, of_client(batches, c), mu=3.0) for c in cohort]
    assert_close(after.server.shared, mean(pulled, weights), shared)
    free = [plain_client(model, params, shared, of_client(batches, c)) for c in cohort]
    with pytest.raises(AssertionError):
        assert_close(after.server.shared, mean(free, weights), shared)


def test_scaffold_over_three_rounds_of_changing_cohorts(run_rounds, spec_of, model, params, batches, examples):
    cohorts = [(0, 2), (1, 2), (0, 3)]
    _, first, states, _ = run_rounds(spec_of("scaffold"), cohorts)
    x = first.server.shared
    zero = tree_map(np.zeros_like, x)
    c, c_of = zero, [zero] * N
    for cohort, state in zip(cohorts, states, strict=True):
        trained, changes = [], []
        for i in cohort:
            drift = tree_map(np.subtract, c, c_of[i])
            correct = partial(tree_map, lambda d, w: w - LEARNING_RATE * d, drift)
            y = plain_client(model, params, x, of_client(batches, i), correct)
            new = tree_map(lambda c_i, c, x, y: c_i - c + (x - y) / (STEPS * LEARNING_RATE), c_of[i], c, x, y)
            changes.append(tree_map(np.subtract, new, c_of[i]))
            c_of[i] = new
            trained.append(y)
        x = mean(trained, shares(examples, cohort))
        c = tree_map(lambda c, *changed: c + sum(changed) / N, c, *changes)
        assert_close(state.server.shared, x, first.server.shared)
        assert_close(state.server.extra["control"], c, zero, bound=1e-3)
    for i in range(N):
        assert_close(of_client(states[-1].clients.extra["control"], i), c_of[i], zero, bound=1e-3)


SECOND_MOMENTS = {
    "fedadagrad": lambda v, square: v + square,
    "fedadam": lambda v, square: 0.8 * v + 0.2 * square,
    "fedyogi": lambda v, square: v - 0.2 * square * np.sign(v - square),
}
MOMENTS = {"eta": 0.3, "tau": 0.05, "beta1": 0.6, "beta2": 0.8}
HPARAMS = {"fedavgm": {"beta1": 0.6}, "fedadagrad": {"eta": 0.3, "tau": 0.05}, "fedadam": MOMENTS, "fedyogi": MOMENTS}


@pytest.mark.parametrize("name", HPARAMS)
def test_server_optimisers_over_four_rounds(name):
    """Reddi et al., algorithm 2, on one number for each client, in NumPy."""
    rule, rng = make_method(name, HPARAMS[name]).server, np.random.default_rng(0)
    weights = np.array([0.2, 0.3, 0.5], np.float32)
    shared = {"w": np.float32(1.0)}
    server = ServerState(shared, rule.init_extra(shared, None))
    w, m, v = 1.0, 0.0, 0.05**2
    for number in range(4):
        deltas = rng.normal(size=3).astype(np.float32)
        context = ServerContext(Upload({"w": deltas}), weights, partial(weighted_mean, weights=weights), 3)
        server = rule.update(server, context)
        delta = float(weights @ deltas)
        m = delta if number == 0 or name == "fedadagrad" else 0.6 * m + 0.4 * delta
        if name == "fedavgm":
            w += m
        else:
            v = SECOND_MOMENTS[name](v, m * m)
            w += 0.3 * m / (np.sqrt(v) + 0.05)
        np.testing.assert_allclose(server.shared["w"], w, rtol=1e-5)


def test_clients_have_equal_weights_if_that_is_asked_for(run_rounds, spec_of, model, params, batches):
    _, first, (after,), _ = run_rounds(spec_of("fedavg", settings=Settings(weighting="uniform")), [(0, 3)])
    shared = first.server.shared
    trained = [plain_client(model, params, shared, of_client(batches, c)) for c in (0, 3)]
    assert_close(after.server.shared, mean(trained, (0.5, 0.5)), shared)
