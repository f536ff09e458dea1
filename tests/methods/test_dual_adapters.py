"""FedPer, FedRep, FedDPA and FDLoRA: written out by hand over rounds, and the limits that their papers name."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from flex_jax.errors import InputError
from flex_jax.federated.client import client_variables
from flex_jax.federated.method import ClientContext, Download, Settings
from flex_jax.federated.state import ClientState
from flex_jax.methods import make_method
from tests.federated.helpers import (
    N,
    assert_close,
    assert_equal,
    gradient,
    loss_of,
    mean,
    of_client,
    plain_client,
    shares,
    train,
    tree_map,
)

# FedPer, FedRep: three layers, of which the last two are personal.
CUT = {"fedper": {"personal_layers": 2}, "fedrep": {"personal_layers": 2, "personal_steps": 0.4}}


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
def test_upper_layers_stay_with_their_clients(name, local, run_rounds, spec_of, model, params, batches, examples):
    spec, cohorts = spec_of(name, CUT[name]), [(0, 2), (1, 2)]
    frozen, first, states, _ = run_rounds(spec, cohorts)
    lower, uppers = first.server.shared, [of_client(first.clients.personal, i) for i in range(N)]
    assert {len(leaf) for leaf in jax.tree.leaves(lower)} == {1}  # what is sent: one layer of three
    for cohort, state in zip(cohorts, states, strict=True):
        trained = []
        for i in cohort:
            data = list(zip(*of_client(batches, i), strict=True))
            below, uppers[i] = local(model, params, lower, uppers[i], data)
            trained.append(below)
        lower = mean(trained, shares(examples, cohort))
        assert_close(state.server.shared, lower, first.server.shared)
        for i in cohort:
            assert_close(of_client(state.clients.personal, i), uppers[i], of_client(first.clients.personal, i))
    after = states[-1]
    assert_equal(of_client(after.clients.personal, 3), of_client(first.clients.personal, 3))
    adapters = client_variables(spec, frozen, after.server, of_client(after.clients, 0))["adapters"]
    start = join(first.server.shared, of_client(first.clients.personal, 0))
    assert_close(adapters, join(lower, uppers[0]), start)


def test_fedper_of_one_client_is_local_training(run_rounds, spec_of):
    cohorts = [(1,), (1,)]
    _, first, ours, _ = run_rounds(spec_of("fedper", CUT["fedper"]), cohorts)
    _, _, local, _ = run_rounds(spec_of("local"), cohorts)
    start = join(first.server.shared, of_client(first.clients.personal, 1))
    for a, b in zip(ours, local, strict=True):
        whole = join(a.server.shared, of_client(a.clients.personal, 1))
        assert_close(whole, of_client(b.clients.personal, 1), start, bound=1e-5)


def test_the_cut_keeps_all_layers_and_needs_one_to_share(model):
    stacks = {"layers": {"a": jnp.arange(6.0).reshape(3, 2)}, "dense_layers": {"a": jnp.ones((1, 2))}}
    method = make_method("fedper", {"personal_layers": 2})
    tree = method.build(stacks, None)
    assert tree["lower"]["layers"]["a"].tolist() == [[0, 1]] and "dense_layers" not in tree["upper"]
    assert_equal(method.compose(tree, {}, {}), stacks)
    for name in ("fedper", "fedrep"):
        with pytest.raises(InputError, match="personal_layers is 3: must be below 3"):
            make_method(name, {"personal_layers": 3}).check(model, Settings())


# FedDPA


def with_mean_of(params, *trees):
    """The frozen parameters with the mean of the trees' alpha / r A B added to the kernels, which needs no LoRA."""

    def change(*pairs):
        return {"kernel": 2.0 * sum(pair["lora_a"] @ pair["lora_b"] for pair in pairs) / len(pairs)}

    changes = tree_map(change, *trees, is_leaf=lambda node: "lora_a" in node)
    flat = flatten_dict(params)
    return unflatten_dict(flat | {path: flat[path] + leaf for path, leaf in flatten_dict(changes).items()})


@partial(jax.jit, static_argnums=0)
def gradient_in_mix(model, params, shared, personal, tokens, mask):
    def loss(personal):
        return loss_of(model, with_mean_of(params, shared, personal), {}, tokens, mask)

    return jax.grad(loss)(personal)


def test_feddpa_trains_its_personal_adapter_and_then_the_shared_one(
    run_rounds, spec_of, model, params, batches, examples
):
    spec = spec_of("feddpa", {"personal_steps": 0.6})  # two of three steps
    # In one step from fresh moments AdamW makes noise of a gradient as small as its epsilon. If client 2 is in the
    # first round, one entry of the second has that.
    cohorts = [(0, 3), (0, 2), (0, 3)]
    frozen, first, states, _ = run_rounds(spec, cohorts)
    shared = first.server.shared["global"]
    personal = [of_client(first.clients.personal["personal"], i) for i in range(N)]
    for number, (cohort, state) in enumerate(zip(cohorts, states, strict=True)):
        trained = []
        for i in cohort:
            data = list(zip(*of_client(batches, i), strict=True))
            if number > 0:
                personal[i] = train(personal[i], partial(gradient_in_mix, model, params, shared), data[:2])
                data = data[2:]
            trained.append(train(shared, partial(gradient, model, params), data))
        shared = mean(trained, shares(examples, cohort))
        assert_close(state.server.shared["global"], shared, first.server.shared["global"])
    ours = [of_client(states[-1].clients.personal["personal"], i) for i in range(N)]
    for i in (0, 2, 3):
        assert_close(ours[i], personal[i], of_client(first.clients.personal["personal"], i))
    assert_equal(ours[1], personal[1])

    tokens = batches.tokens[0, 0]
    variables = client_variables(spec, frozen, states[-1].server, of_client(states[-1].clients, 0))
    logits = model.apply(variables, tokens).logits
    by_hand = model.apply({"params": with_mean_of(params, shared, personal[0])}, tokens).logits
    np.testing.assert_allclose(logits, by_hand, atol=1e-3)


def test_feddpa_starts_its_personal_adapter_from_other_random_values(prepared, spec_of):
    _, first = prepared(spec_of("feddpa"))
    trees = first.server.shared, of_client(first.clients.personal, 0)
    for shared, personal in zip(*map(jax.tree.leaves, trees), strict=True):
        assert (np.abs(personal - shared).max() > 0) == bool(np.abs(shared).max() > 0)  # B of both is zero
        assert np.abs(personal).max() <= 0.25  # 1 / sqrt(D)


# FDLoRA


def fused(weights, personal, shared):
    return tree_map(lambda a, b: weights[0] * a + weights[1] * b, personal, shared)


def test_fdlora_over_four_rounds_of_changing_cohorts(run_rounds, spec_of, model, params, batches, examples):
    """Stage 1, the outer optimiser, copies every second round of a client, and the fusion.

    The weights of the fusion are those of the round before.
    """
    spec = spec_of("fdlora", {"sync_every": 2, "eta": 0.7, "beta1": 0.6})
    cohorts = [(0, 2), (0, 3), (0, 2), (0, 3)]
    frozen, first, states, _ = run_rounds(spec, cohorts)
    start = theta = first.server.shared["global"]
    personal, weights, finished = [start] * N, [(0.0, 1.0)] * N, [0] * N
    velocity = tree_map(np.zeros_like, theta)
    for number, (cohort, state) in enumerate(zip(cohorts, states, strict=True)):
        trained = []
        for i in cohort:
            data = of_client(batches, i)
            if finished[i]:
                candidates = list(itertools.product((0.0, 0.5, 1.0), repeat=2))
                losses = [
                    float(loss_of(model, params, fused(w, personal[i], theta), data.tokens[0], data.loss_mask[0]))
                    + 0.05 * sum(w) / 2
                    for w in candidates
                ]
                weights[i] = candidates[int(np.argmin(losses))]
            y = plain_client(model, params, theta, data)
            personal[i] = y if finished[i] % 2 == 0 else personal[i]
            finished[i] += 1
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
            assert_close(of_client(state.clients.personal["personal"], i), personal[i], start)
        np.testing.assert_array_equal(state.clients.extra["fusion"], np.array(weights))
    adapters = client_variables(spec, frozen, state.server, of_client(state.clients, 0))["adapters"]
    tree_map(partial(np.testing.assert_allclose, atol=1e-5), adapters, fused(weights[0], personal[0], theta))


def test_fdlora_fuses_with_the_weights_of_least_penalised_loss():
    personal, shared = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}
    extra = {"rounds": jnp.int32(3), "fusion": jnp.array([0.0, 1.0])}
    client = ClientState({"personal": personal}, {}, extra, {})
    context = ClientContext(Download({"global": shared}, {}), {}, client, 3, 1e-2, 5)

    def search(context, target, scale):
        def loss(tree):  # in terms of (w1, w2)
            return scale * jnp.square(tree["global"]["w"] - jnp.array(target)).sum()

        return make_method("fdlora").client.init_trained(context, loss).personal["fusion"].tolist()

    assert search(context, (1.0, 0.5), 1.0) == [1.0, 0.5]
    assert search(context, (1.0, 0.5), 0.01) == [0.0, 0.0]  # all that it can gain costs more
    newcomer = context._replace(state=client._replace(extra=extra | {"rounds": jnp.int32(0)}))
    assert search(newcomer, (1.0, 0.5), 1.0) == [0.0, 1.0]


def test_a_round_of_personal_steps_alone_changes_nothing_shared(run_rounds, spec_of):
    """FedRep: the tree that is not trained does not move at all, not even by weight decay."""
    _, first, (after,), _ = run_rounds(spec_of("fedrep", {"personal_steps": 1.0}), [(0, 2)])
    assert_equal(after.server.shared, first.server.shared)
    with pytest.raises(AssertionError):
        assert_equal(after.clients.personal, first.clients.personal)
