"""Methods whose clients have a personal copy of the adapters: Ditto, APFL, FedALA."""

import jax
import numpy as np
import optax
import pytest

from flex_jax.federated.client import client_context, client_variables
from tests.federated.helpers import (
    LEARNING_RATE,
    N,
    adamw,
    assert_close,
    gradient,
    mean,
    of_client,
    plain_client,
    shares,
    tree_map,
)

COHORTS = [(0, 2), (1, 2)]


def model_of(spec, frozen, state, client):
    """The adapters of one client's model."""
    return client_variables(spec, frozen, state.server, of_client(state.clients, client))["adapters"]


def ditto_client(model, params, v, w_t, data, strength):
    def pull(v):
        return tree_map(lambda v, w: (v + LEARNING_RATE * strength * w) / (1 + LEARNING_RATE * strength), v, w_t)

    return plain_client(model, params, v, data, pull)


def test_ditto_pulls_every_step_of_the_personal_weights_to_the_downloaded_ones(
    run_rounds, spec_of, model, params, batches, examples
):
    _, first, states, _ = run_rounds(spec_of("ditto", {"lambda_": 30.0}), COHORTS)
    start = w = first.server.shared["global"]
    v = [start] * N
    for cohort, state in zip(COHORTS, states, strict=True):
        for i in cohort:
            v[i] = ditto_client(model, params, v[i], w, of_client(batches, i), strength=30.0)
        trained = [plain_client(model, params, w, of_client(batches, i)) for i in cohort]
        w = mean(trained, shares(examples, cohort))
        assert_close(state.server.shared["global"], w, start)
        for i in cohort:
            assert_close(of_client(state.clients.personal["personal"], i), v[i], start)


def test_ditto_is_local_training_without_a_pull_and_fedavg_in_its_limit(run_rounds, spec_of):
    _, first, ditto, _ = run_rounds(spec_of("ditto", {"lambda_": 0.0}), COHORTS)
    _, _, local, _ = run_rounds(spec_of("local"), COHORTS)
    start = first.server.shared["global"]
    for i in (0, 1, 2):
        v, alone = ditto[-1].clients.personal["personal"], local[-1].clients.personal
        assert_close(of_client(v, i), of_client(alone, i), start, bound=1e-5)
    limit = spec_of("ditto", {"lambda_": 1e12})
    frozen, _, ditto, _ = run_rounds(limit, COHORTS)
    _, _, fedavg, _ = run_rounds(spec_of("fedavg"), COHORTS)
    assert_close(model_of(limit, frozen, ditto[-1], 2), fedavg[0].server.shared, start, bound=1e-5)


def mixed(alpha, v, w):
    return tree_map(lambda v, w: alpha * v + (1 - alpha) * w, v, w)


def dot(a, b):
    return sum(float(np.vdot(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def apfl_client(model, params, alpha, v, w, data):
    of_v, of_w = adamw(), adamw()
    v_state, w_state = of_v.init(v), of_w.init(w)
    for tokens, mask in zip(*data, strict=True):
        of_mixture = gradient(model, params, mixed(alpha, v, w), tokens, mask)
        of_global = gradient(model, params, w, tokens, mask)
        slope = dot(tree_map(np.subtract, v, w), of_mixture)
        step, v_state = of_v.update(tree_map(lambda g, alpha=alpha: alpha * g, of_mixture), v_state, v)
        v = optax.apply_updates(v, step)
        step, w_state = of_w.update(of_global, w_state, w)
        w = optax.apply_updates(w, step)
        alpha = min(max(alpha - LEARNING_RATE * slope, 0.0), 1.0)
    return alpha, v, w


def test_apfl_mixes_its_personal_weights_and_learns_how_much(run_rounds, spec_of, model, params, batches, examples):
    """Over three rounds: in its first a client's personal weights are the global ones: alpha has nothing to choose."""
    spec, cohorts = spec_of("apfl", {"alpha": 0.7}), [*COHORTS, (2, 3)]
    frozen, first, states, _ = run_rounds(spec, cohorts)
    start = w = first.server.shared["global"]
    v, alpha = [start] * N, [0.7] * N
    for cohort, state in zip(cohorts, states, strict=True):
        trained = []
        for i in cohort:
            alpha[i], v[i], y = apfl_client(model, params, alpha[i], v[i], w, of_client(batches, i))
            trained.append(y)
        w = mean(trained, shares(examples, cohort))
        assert_close(state.server.shared["global"], w, start)
        for i in cohort:
            personal = of_client(state.clients.personal, i)
            assert_close(personal["personal"], v[i], start)
            np.testing.assert_allclose(personal["alpha"], alpha[i], atol=1e-5)
    assert abs(alpha[2] - 0.7) > 1e-3
    assert_close(model_of(spec, frozen, states[-1], 2), mixed(alpha[2], v[2], w), start)


@pytest.mark.parametrize(("slope", "expected"), [(4.0, 0.56), (100.0, 0.0), (-100.0, 1.0)])
def test_apfls_alpha_takes_plain_steps_within_its_bounds(slope, expected, spec_of, prepared):
    """They are not AdamW's, whose size would be the learning rate, and not clipped with the weights."""
    spec = spec_of("apfl", {"alpha": 0.6})
    _, state = prepared(spec)
    client, rule = of_client(state.clients, 0), spec.method.client
    context = client_context(spec, state.server, client, round=0, learning_rate=LEARNING_RATE, num_steps=1)
    trained = rule.init_trained(context, None)
    optimizer = rule.optimizer(context, optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE))
    gradients = tree_map(np.ones_like, trained)
    gradients.personal["alpha"] = np.float32(slope)
    updates, _ = optimizer.update(gradients, optimizer.init(trained), trained)
    np.testing.assert_allclose(optax.apply_updates(trained, updates).personal["alpha"], expected, atol=1e-6)


def last_two(tree):
    return tree_map(lambda leaf: leaf[1:], tree["layers"])


def aggregated(theta, weight, theta_global):
    """theta^; the lowest of three layers takes over what was downloaded."""

    def one(theta, w, new):
        return np.concatenate([new[:1], theta[1:] + (new[1:] - theta[1:]) * w[1:]])

    return tree_map(one, theta, weight, theta_global)


def fedala_start(model, params, theta, weight, theta_global, data, eta):
    """(W, theta^) after five steps on the first batch."""
    tokens, mask = of_client(tuple(data), 0)
    for _ in range(5):
        g = gradient(model, params, aggregated(theta, weight, theta_global), tokens, mask)
        slope = tree_map(lambda g, theta, new: g * (new - theta), g, theta, theta_global)
        weight = tree_map(lambda w, s: np.clip(w - eta * s, 0, 1), weight, slope)
    return weight, aggregated(theta, weight, theta_global)


def test_fedala_starts_between_its_last_weights_and_the_downloaded_ones(
    run_rounds, spec_of, model, params, batches, examples
):
    """Over three rounds: it learns from what it learned the last time."""
    spec, cohorts = spec_of("fedala", {"eta": 200.0, "personal_layers": 2}), [*COHORTS, (2, 3)]
    frozen, first, states, _ = run_rounds(spec, cohorts)
    start = w = first.server.shared["global"]
    ones = tree_map(np.ones_like, start)
    theta, weight = [start] * N, [ones] * N
    for number, (cohort, state) in enumerate(zip(cohorts, states, strict=True)):
        for i in cohort:
            data = of_client(batches, i)
            weight[i], begun = fedala_start(model, params, theta[i], weight[i], w, data, eta=200.0)
            theta[i] = plain_client(model, params, begun, data)
        w = mean([theta[i] for i in cohort], shares(examples, cohort))
        assert_close(state.server.shared["global"], w, start)
        for i in cohort:
            personal = of_client(state.clients.personal, i)
            assert_close(personal["personal"], last_two(theta[i]), last_two(start))
            if number == 0:  # it downloaded what it had: nothing to learn
                tree_map(np.testing.assert_array_equal, personal["weight"], last_two(ones))
            else:
                assert_close(personal["weight"], last_two(weight[i]), last_two(ones), bound=1e-3)
    learned = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(last_two(weight[2]))])
    assert (learned == 0).any() and (learned == 1).any() and ((learned > 0) & (learned < 1)).any()
    assert_close(model_of(spec, frozen, states[-1], 2), aggregated(theta[2], weight[2], w), start)
