"""FedIT, FedPer, FedRep, FedDPA and FDLoRA: written out by hand over rounds, and the limits that their papers name."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from flex_jax.errors import InputError
from flex_jax.federated.client import collections
from flex_jax.federated.method import ClientSettings, Received, ServerSettings, Settings
from flex_jax.federated.state import ClientState
from flex_jax.methods import METHODS
from flex_jax.models.objective import response_loss
from tests.methods.test_paper_methods import RATE, assert_close, gradient, mean, plain_client, tree_map


def run(name, prepared, one_round, cohorts, settings):
    """(frozen, first state, states after each round of these cohorts)."""
    frozen, first = prepared(name, settings=settings)
    states, state = [], first
    for cohort in cohorts:
        state, _ = one_round(name, frozen, state, cohort=cohort, settings=settings, **RATE)
        states.append(state)
    return frozen, first, states


def row(tree, client):
    return tree_map(lambda leaf: leaf[client], tree)


def shares(examples, cohort):
    return examples[list(cohort)] / examples[list(cohort)].sum()


def train(tree, gradient, data):
    """Steps from fresh moments on `data`, of a tree alone; gradient: (tree, tokens, mask) -> tree."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1))
    state = optimizer.init(tree)
    for tokens, mask in data:
        updates, state = optimizer.update(gradient(tree, tokens, mask), state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree


# FedPer, FedRep: three layers, of which the last two are personal.
CUT = Settings(ClientSettings(personal_layers=2, personal_steps=0.4))


def join(lower, upper):
    parts = lower["lower"]["layers"], upper["upper"]["layers"]
    return {"layers": tree_map(lambda *leaves: jnp.concatenate(leaves), *parts)}


def divide(adapters):
    first, last = (tree_map(lambda leaf, cut=cut: leaf[cut], adapters) for cut in (slice(0, 1), slice(1, 3)))
    return {"lower": first}, {"upper": last}


def jointly(model, params, lower, upper, data):
    return divide(plain_client(model, params, join(lower, upper), zip(*data, strict=True)))


def head_then_body(model, params, lower, upper, data):
    """Of three steps 40% on the head: the first one."""

    def head(upper, tokens, mask):
        return divide(gradient(model, params, join(lower, upper), tokens, mask))[1]

    def body(lower, tokens, mask):
        return divide(gradient(model, params, join(lower, upper), tokens, mask))[0]

    upper = train(upper, head, data[:1])
    return train(lower, body, data[1:]), upper


@pytest.mark.parametrize(("name", "local"), [("fedper", jointly), ("fedrep", head_then_body)])
def test_upper_layers_stay_with_their_clients(
    name, local, prepared, one_round, recipe_of, model, params, batches, examples
):
    cohorts = [(0, 2), (1, 2)]
    frozen, first, states = run(name, prepared, one_round, cohorts, CUT)
    lower, uppers = first.server.shared, [row(first.clients.personal, i) for i in range(4)]
    assert {len(leaf) for leaf in jax.tree.leaves(lower)} == {1}  # what is sent: one layer of three
    for cohort, state in zip(cohorts, states, strict=True):
        trained = []
        for i in cohort:
            data = list(zip(*row(batches, i), strict=True))
            below, uppers[i] = local(model, params, lower, uppers[i], data)
            trained.append(below)
        lower = mean(trained, shares(examples, cohort))
        assert_close(state.server.shared, lower, first.server.shared)
        for i in cohort:
            assert_close(row(state.clients.personal, i), uppers[i], row(first.clients.personal, i))
    after = states[-1]
    jax.tree.map(np.testing.assert_array_equal, row(after.clients.personal, 3), row(first.clients.personal, 3))
    adapters = collections(recipe_of(name, CUT), frozen, after.server, row(after.clients, 0))["adapters"]
    assert_close(adapters, join(lower, uppers[0]), join(first.server.shared, row(first.clients.personal, 0)))


def test_fedper_of_one_client_is_local_training(prepared, one_round):
    cohorts = [(1,), (1,)]
    _, first, ours = run("fedper", prepared, one_round, cohorts, CUT)
    _, _, local = run("local", prepared, one_round, cohorts, Settings())
    start = join(first.server.shared, row(first.clients.personal, 1))
    for a, b in zip(ours, local, strict=True):
        own = join(a.server.shared, row(a.clients.personal, 1))
        assert_close(own, row(b.clients.personal, 1), start, bound=1e-5)


def test_the_cut_keeps_all_layers_and_needs_one_to_share():
    stacks = {"layers": {"a": jnp.arange(6.0).reshape(3, 2)}, "dense_layers": {"a": jnp.ones((1, 2))}}
    method = METHODS["fedper"]
    tree = method.build(stacks, None, CUT)
    assert tree["lower"]["layers"]["a"].tolist() == [[0, 1]] and "dense_layers" not in tree["upper"]
    jax.tree.map(np.testing.assert_array_equal, method.compose(tree, None), stacks)
    with pytest.raises(InputError, match="config.client.personal_layers is 3: must be below 3"):
        method.build(stacks, None, Settings(ClientSettings(personal_layers=3)))


# FedDPA


def with_mean_of(params, *trees):
    """The frozen parameters with the mean of the trees' alpha / r A B added to the kernels, which needs no LoRA."""

    def change(*pairs):
        return {"kernel": 2.0 * sum(pair["lora_a"] @ pair["lora_b"] for pair in pairs) / len(pairs)}

    changes = tree_map(change, *trees, is_leaf=lambda node: "lora_a" in node)
    flat = flatten_dict(params)
    return unflatten_dict(flat | {path: flat[path] + leaf for path, leaf in flatten_dict(changes).items()})


@partial(jax.jit, static_argnums=0)
def gradient_in_mix(model, params, held, own, tokens, mask):
    def loss(own):
        total, count = response_loss(model, {"params": with_mean_of(params, held, own)}, tokens, mask)
        return total / count

    return jax.grad(loss)(own)


def test_feddpa_trains_its_own_adapter_and_then_the_shared_one(
    prepared, one_round, recipe_of, model, params, batches, examples
):
    settings = Settings(ClientSettings(personal_steps=0.6))  # two of three steps
    # In one step from fresh moments AdamW makes noise of a gradient as small as its epsilon; with client 2 in the first
    # round one entry of the second has that.
    cohorts = [(0, 3), (0, 2), (0, 3)]
    frozen, first, states = run("feddpa", prepared, one_round, cohorts, settings)
    common = first.server.shared["global"]
    own = [row(first.clients.personal["own"], i) for i in range(4)]
    for number, (cohort, state) in enumerate(zip(cohorts, states, strict=True)):
        trained = []
        for i in cohort:
            data = list(zip(*row(batches, i), strict=True))
            if number > 0:
                own[i] = train(own[i], partial(gradient_in_mix, model, params, common), data[:2])
                data = data[2:]
            trained.append(train(common, partial(gradient, model, params), data))
        common = mean(trained, shares(examples, cohort))
        assert_close(state.server.shared["global"], common, first.server.shared["global"])
    personal = [row(states[-1].clients.personal["own"], i) for i in range(4)]
    for i in (0, 2, 3):
        assert_close(personal[i], own[i], row(first.clients.personal["own"], i))
    jax.tree.map(np.testing.assert_array_equal, personal[1], own[1])

    tokens = batches.tokens[0, 0]
    variables = collections(recipe_of("feddpa", settings), frozen, states[-1].server, row(states[-1].clients, 0))
    logits = model.apply(variables, tokens).logits
    by_hand = model.apply({"params": with_mean_of(params, common, own[0])}, tokens).logits
    np.testing.assert_allclose(logits, by_hand, atol=1e-3)


def test_feddpa_starts_its_own_adapter_from_other_random_values(prepared):
    _, first = prepared("feddpa")
    pairs = zip(*(jax.tree.leaves(tree) for tree in (first.server.shared, row(first.clients.personal, 0))), strict=True)
    for common, own in pairs:
        assert (np.abs(own - common).max() > 0) == bool(np.abs(common).max() > 0)  # B of both is zero
        assert np.abs(own).max() <= 0.25  # 1 / sqrt(D)


# FDLoRA


@partial(jax.jit, static_argnums=0)
def loss_of(model, params, adapters, tokens, mask):
    total, count = response_loss(model, {"params": params, "adapters": adapters}, tokens, mask)
    return total / count


def fused(weights, own, common):
    return tree_map(lambda a, b: weights[0] * a + weights[1] * b, own, common)


def test_fdlora_over_four_rounds_of_changing_cohorts(prepared, one_round, recipe_of, model, params, batches, examples):
    """Stage 1, the outer optimiser, copies every second round of a client, and the fusion with the weights of the round
    before."""
    settings = Settings(ClientSettings(sync_every=2), ServerSettings(learning_rate=0.7, beta1=0.6))
    cohorts = [(0, 2), (0, 3), (0, 2), (0, 3)]
    frozen, first, states = run("fdlora", prepared, one_round, cohorts, settings)
    start = theta = first.server.shared["global"]
    own, weights, taken = [start] * 4, [(0.0, 1.0)] * 4, [0] * 4
    velocity = tree_map(np.zeros_like, theta)
    for number, (cohort, state) in enumerate(zip(cohorts, states, strict=True)):
        trained = []
        for i in cohort:
            data = row(batches, i)
            if taken[i]:
                candidates = list(itertools.product((0.0, 0.5, 1.0), repeat=2))
                losses = [
                    float(loss_of(model, params, fused(w, own[i], theta), data.tokens[0], data.loss_mask[0]))
                    + 0.05 * sum(w) / 2
                    for w in candidates
                ]
                weights[i] = candidates[int(np.argmin(losses))]
            y = plain_client(model, params, theta, data)
            own[i] = y if taken[i] % 2 == 0 else own[i]
            taken[i] += 1
            trained.append(y)
        average = mean(trained, shares(examples, cohort))
        if number == 0:
            theta = average
        else:  # PyTorch's SGD with Nesterov momentum on theta - mean
            step = tree_map(np.subtract, theta, average)
            velocity = tree_map(lambda v, g: 0.6 * v + g, velocity, step)
            theta = tree_map(lambda w, v, g: w - 0.7 * (g + 0.6 * v), theta, velocity, step)
        assert_close(state.server.shared["global"], theta, start)
        for i in {0, 2, 3} if number else {0, 2}:
            assert_close(row(state.clients.personal["own"], i), own[i], start)
        np.testing.assert_array_equal(state.clients.kept["fusion"], np.array(weights))
    adapters = collections(recipe_of("fdlora", settings), frozen, state.server, row(state.clients, 0))["adapters"]
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), adapters, fused(weights[0], own[0], theta))


def test_fdlora_fuses_with_the_weights_of_least_penalised_loss():
    own, common = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}
    kept = {"rounds": jnp.int32(3), "fusion": jnp.array([0.0, 1.0])}
    client = ClientState({"own": own}, {}, kept, {})
    received = Received({"shared": {"global": common}}, {}, client, 3, 1e-2, 5, Settings())

    def search(received, target, scale):
        def loss(tree):  # in terms of (w1, w2)
            return scale * jnp.square(tree["global"]["w"] - jnp.array(target)).sum()

        return METHODS["fdlora"].client.begin(received, loss)["personal"]["fusion"].tolist()

    assert search(received, (1.0, 0.5), 1.0) == [1.0, 0.5]
    assert search(received, (1.0, 0.5), 0.01) == [0.0, 0.0]  # all that it can gain costs more
    newcomer = received._replace(client=client._replace(kept=kept | {"rounds": jnp.int32(0)}))
    assert search(newcomer, (1.0, 0.5), 1.0) == [0.0, 1.0]


def test_a_round_of_personal_steps_alone_changes_nothing_shared(prepared, one_round):
    """FedRep: what rests does not move at all, not even by weight decay."""
    settings = Settings(ClientSettings(personal_steps=1.0))
    _, first, (after,) = run("fedrep", prepared, one_round, [(0, 2)], settings)
    jax.tree.map(np.testing.assert_array_equal, after.server.shared, first.server.shared)
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, after.clients.personal, first.clients.personal)
