"""Methods whose clients keep a copy of the adapters to themselves: Ditto, APFL, FedALA."""

import jax
import numpy as np
import optax
import pytest

from flex_jax.federated.client import collections, receive
from flex_jax.federated.method import DEFAULTS, ClientSettings, Settings
from flex_jax.methods import METHODS
from tests.methods.test_paper_methods import RATE, assert_close, gradient, mean, plain_client, tree_map

COHORTS = [(0, 2), (1, 2)]
LR = 1e-2


def adamw():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LR, weight_decay=0.1))


def rounds(name, prepared, one_round, cohorts, settings=DEFAULTS):
    """(frozen, first state, states after each round of these cohorts)."""
    frozen, first = prepared(name, settings=settings)
    states, state = [], first
    for cohort in cohorts:
        state, _ = one_round(name, frozen, state, cohort=cohort, settings=settings, **RATE)
        states.append(state)
    return frozen, first, states


def of_client(batches, client):
    return [leaf[client] for leaf in batches]


def row(state, client):
    return tree_map(lambda leaf: leaf[client], state.clients)


def federated_mean(trees, cohort, examples):
    weights = examples[list(cohort)] / examples[list(cohort)].sum()
    return mean(trees, weights)


def model_of(recipe_of, name, settings, frozen, state, client):
    return collections(recipe_of(name, settings), frozen, state.server, row(state, client))["adapters"]


def ditto_client(model, params, own, anchor, data, pull):
    optimizer = adamw()
    state = optimizer.init(own)
    for tokens, mask in zip(*data, strict=True):
        updates, state = optimizer.update(gradient(model, params, own, tokens, mask), state, own)
        own = optax.apply_updates(own, updates)
        own = tree_map(lambda v, w: (v + LR * pull * w) / (1 + LR * pull), own, anchor)
    return own


def test_ditto_pulls_every_step_of_the_own_weights_to_the_received_ones(
    prepared, one_round, model, params, batches, examples
):
    settings = Settings(ClientSettings(ditto_lambda=30.0))
    _, first, states = rounds("ditto", prepared, one_round, COHORTS, settings=settings)
    start = w = first.server.shared["global"]
    own = [start] * 4
    for cohort, state in zip(COHORTS, states, strict=True):
        for i in cohort:
            own[i] = ditto_client(model, params, own[i], w, of_client(batches, i), pull=30.0)
        w = federated_mean([plain_client(model, params, w, of_client(batches, i)) for i in cohort], cohort, examples)
        assert_close(state.server.shared["global"], w, start)
        for i in cohort:
            assert_close(row(state, i).personal["own"], own[i], start)


def test_ditto_is_local_training_without_a_pull_and_fedavg_in_its_limit(prepared, one_round, recipe_of):
    free, bound = (Settings(ClientSettings(ditto_lambda=value)) for value in (0.0, 1e12))
    _, first, ditto = rounds("ditto", prepared, one_round, COHORTS, settings=free)
    _, _, local = rounds("local", prepared, one_round, COHORTS)
    start = first.server.shared["global"]
    for i in (0, 1, 2):
        assert_close(row(ditto[-1], i).personal["own"], row(local[-1], i).personal, start, bound=1e-5)
    frozen, _, ditto = rounds("ditto", prepared, one_round, COHORTS, settings=bound)
    _, _, fedavg = rounds("fedavg", prepared, one_round, COHORTS)
    received = fedavg[0].server.shared
    assert_close(model_of(recipe_of, "ditto", bound, frozen, ditto[-1], 2), received, start, bound=1e-5)


def mixed(alpha, own, common):
    return tree_map(lambda v, w: alpha * v + (1 - alpha) * w, own, common)


def dot(a, b):
    return sum(float(np.vdot(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def apfl_client(model, params, alpha, own, common, data):
    ours, theirs = adamw(), adamw()
    our_state, their_state = ours.init(own), theirs.init(common)
    for tokens, mask in zip(*data, strict=True):
        of_mixture = gradient(model, params, mixed(alpha, own, common), tokens, mask)
        of_common = gradient(model, params, common, tokens, mask)
        slope = dot(tree_map(np.subtract, own, common), of_mixture)
        step, our_state = ours.update(tree_map(lambda g, alpha=alpha: alpha * g, of_mixture), our_state, own)
        own = optax.apply_updates(own, step)
        step, their_state = theirs.update(of_common, their_state, common)
        common = optax.apply_updates(common, step)
        alpha = min(max(alpha - LR * slope, 0.0), 1.0)
    return alpha, own, common


def test_apfl_mixes_its_own_weights_and_learns_how_much(
    prepared, one_round, recipe_of, model, params, batches, examples
):
    """Over three rounds: in its first a client's own weights are the common ones, and alpha has nothing to choose."""
    settings, cohorts = Settings(ClientSettings(mixing_alpha=0.7)), [*COHORTS, (2, 3)]
    frozen, first, states = rounds("apfl", prepared, one_round, cohorts, settings=settings)
    start = w = first.server.shared["global"]
    own, alpha = [start] * 4, [0.7] * 4
    for cohort, state in zip(cohorts, states, strict=True):
        common = []
        for i in cohort:
            alpha[i], own[i], trained = apfl_client(model, params, alpha[i], own[i], w, of_client(batches, i))
            common.append(trained)
        w = federated_mean(common, cohort, examples)
        assert_close(state.server.shared["global"], w, start)
        for i in cohort:
            assert_close(row(state, i).personal["own"], own[i], start)
            np.testing.assert_allclose(row(state, i).personal["alpha"], alpha[i], atol=1e-5)
    assert abs(alpha[2] - 0.7) > 1e-3
    model_of_2 = model_of(recipe_of, "apfl", settings, frozen, states[-1], 2)
    assert_close(model_of_2, mixed(alpha[2], own[2], w), start)


@pytest.mark.parametrize(("slope", "expected"), [(4.0, 0.56), (100.0, 0.0), (-100.0, 1.0)])
def test_apfls_alpha_takes_plain_steps_within_its_bounds(slope, expected, recipe_of, prepared):
    """Neither AdamW's, whose size would be the learning rate, nor clipped with the weights."""
    _, state = prepared("apfl", settings=Settings(ClientSettings(mixing_alpha=0.6)))
    received = receive(recipe_of("apfl"), state.server, row(state, 0), learning_rate=LR)
    trained = METHODS["apfl"].client.begin(received, None)
    optimizer = METHODS["apfl"].client.optimizer(received, optax.clip_by_global_norm(1.0), optax.adamw(LR))
    gradients = tree_map(np.ones_like, trained)
    gradients["personal"]["alpha"] = np.float32(slope)
    updates, _ = optimizer.update(gradients, optimizer.init(trained), trained)
    np.testing.assert_allclose(optax.apply_updates(trained, updates)["personal"]["alpha"], expected, atol=1e-6)


def last_two(tree):
    return tree_map(lambda leaf: leaf[1:], tree["layers"])


def aggregated(own, weight, received):
    """theta^; the lowest of three layers takes what it received."""

    def one(theta, w, new):
        return np.concatenate([new[:1], theta[1:] + (new[1:] - theta[1:]) * w[1:]])

    return tree_map(one, own, weight, received)


def fedala_start(model, params, own, weight, received, data, eta):
    """(W, theta^) after five steps on the first batch."""
    tokens, mask = (leaf[0] for leaf in data)
    for _ in range(5):
        begun = aggregated(own, weight, received)
        slope = tree_map(
            lambda g, theta, new: g * (new - theta), gradient(model, params, begun, tokens, mask), own, received
        )
        weight = tree_map(lambda w, s: np.clip(w - eta * s, 0, 1), weight, slope)
    return weight, aggregated(own, weight, received)


def test_fedala_starts_between_its_last_weights_and_the_received_ones(
    prepared, one_round, recipe_of, model, params, batches, examples
):
    """Over three rounds: it learns from what it learned the last time."""
    settings, cohorts = Settings(ClientSettings(weight_learning_rate=200.0, personal_layers=2)), [*COHORTS, (2, 3)]
    frozen, first, states = rounds("fedala", prepared, one_round, cohorts, settings)
    start = w = first.server.shared["global"]
    ones = tree_map(np.ones_like, start)
    own, weight = [start] * 4, [ones] * 4
    for number, (cohort, state) in enumerate(zip(cohorts, states, strict=True)):
        for i in cohort:
            data = of_client(batches, i)
            weight[i], begun = fedala_start(model, params, own[i], weight[i], w, data, eta=200.0)
            own[i] = plain_client(model, params, begun, data)
        w = federated_mean([own[i] for i in cohort], cohort, examples)
        assert_close(state.server.shared["global"], w, start)
        for i in cohort:
            personal = row(state, i).personal
            assert_close(personal["own"], last_two(own[i]), last_two(start))
            if number == 0:  # it received what it had: nothing to learn
                tree_map(np.testing.assert_array_equal, personal["weight"], last_two(ones))
            else:
                assert_close(personal["weight"], last_two(weight[i]), last_two(ones), bound=1e-3)
    learned = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(last_two(weight[2]))])
    assert (learned == 0).any() and (learned == 1).any() and ((learned > 0) & (learned < 1)).any()
    evaluated = aggregated(own[2], weight[2], w)
    assert_close(model_of(recipe_of, "fedala", settings, frozen, states[-1], 2), evaluated, start)
