"""FedMoE and FedAMoLE, whose clients train some of the experts: written out by hand over layers, clients, rounds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flex_jax.errors import InputError
from flex_jax.federated.compression import tree_bytes
from flex_jax.federated.method import ClientRule, MethodSpec, ServerRule, Settings, Upload
from flex_jax.federated.server import aggregate
from flex_jax.federated.state import ServerState
from flex_jax.methods import make_method
from flex_jax.models.adapters import AdapterConfig
from flex_jax.models.config import LoraConfig
from flex_jax.models.decoder import Decoder
from flex_jax.models.linear import Projection
from flex_jax.ops.experts import ExpertOps, dense_experts
from tests.federated.helpers import N, adamw, assert_close, mean, of_client, plain_client, shares, tree_map


def softmax(values):
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def average(old, experts_of, trained, weights):
    """Each row [l, e] of `old` [L, E, ...] by itself.

    experts_of[i] (layer) gives the experts of client i, in the order of its rows trained[i] [L, r, ...].
    """
    new = np.array(old)
    for layer in range(old.shape[0]):
        for expert in range(old.shape[1]):
            owners = [i for i in range(len(trained)) if expert in experts_of[i](layer)]
            if owners:
                mass = sum(weights[i] for i in owners)
                rows = [weights[i] / mass * trained[i][layer, list(experts_of[i](layer)).index(expert)] for i in owners]
                new[layer, expert] = sum(rows)
    return new


@partial(jax.jit, static_argnums=0)
def replaced_gradient(model, params, trained, tokens, mask, grafted):
    """Of (attention, slot with one expert of each layer), if the slot's experts replace those of the backbone."""

    def loss(trained):
        attention, slot = trained
        layers, moe = jnp.arange(len(grafted)), params["layers"]["moe"]
        gate_up = jnp.concatenate([slot["gate_proj"]["kernel"][:, 0], slot["up_proj"]["kernel"][:, 0]], axis=-1)
        moe = moe | {
            "gate_up": moe["gate_up"].at[layers, grafted].set(gate_up),
            "down": moe["down"].at[layers, grafted].set(slot["down_proj"]["kernel"][:, 0]),
        }
        backbone = params | {"layers": params["layers"] | {"moe": moe}}
        adapters = {"layers": {"attention": attention}}
        logits = model.apply({"params": backbone, "adapters": adapters}, tokens).logits[:, :-1]
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return (entropy * mask[:, 1:]).sum() / mask[:, 1:].sum()

    return jax.grad(loss)(trained)


def test_fedmoe_trains_experts_in_their_place_and_averages_each_over_its_owners(
    run_rounds, spec_of, model, params, batches, examples
):
    """Two rounds. Client c grafts expert 3c + l mod 6 of layer l: clients 0 and 2 the same ones, as 1 and 3."""
    dense = Decoder(model.config, model.adapters, ExpertOps(dense_experts), remat=False)
    optimizer = adamw()
    cohorts = [(0, 2), (0, 1, 2)]
    _, first, states, _ = run_rounds(spec_of("fedmoe"), cohorts)
    layers = first.server.shared["layers"]
    attention, slot = layers["attention"], tree_map(np.asarray, layers["moe"]["slot"])
    begin = attention, slot
    for cohort, state in zip(cohorts, states, strict=True):
        trained = []
        for c in cohort:
            grafted = np.array([3 * c, 3 * c + 1, 3 * c + 2]) % 6
            tree = attention, tree_map(lambda table, grafted=grafted: table[np.arange(3), grafted][:, None], slot)
            opt_state = optimizer.init(tree)
            for tokens, mask in zip(batches.tokens[c], batches.loss_mask[c], strict=True):
                gradient = replaced_gradient(dense, params, tree, tokens, mask, grafted)
                updates, opt_state = optimizer.update(gradient, opt_state, tree)
                tree = optax.apply_updates(tree, updates)
            trained.append(tree)
        weights = shares(examples, cohort)
        experts_of = [lambda layer, c=c: [(3 * c + layer) % 6] for c in cohort]
        attention = mean([tree[0] for tree in trained], weights)
        combined = partial(lambda of, weights, table, *rows: average(table, of, rows, weights), experts_of, weights)
        slot = tree_map(combined, slot, *[tree[1] for tree in trained])
        ours = state.server.shared["layers"]
        assert_close((ours["attention"], ours["moe"]["slot"]), (attention, slot), begin)
    once = states[0].server.shared["layers"]["moe"]["slot"]
    for name, table in begin[1].items():  # in layer 0 of the first round only expert 0 is trained
        np.testing.assert_array_equal(once[name]["kernel"][0, 1:], table["kernel"][0, 1:])


@pytest.mark.parametrize("name", ["fedmoe", "fedamole"])
def test_a_client_downloads_and_uploads_its_own_experts_only(name, run_rounds, spec_of):
    _, first, _, (metrics,) = run_rounds(spec_of(name), [(1,)])
    flat = jax.tree_util.tree_leaves_with_path(first.server.shared)
    rows = {"fedmoe": ("slot", 1 / 6, 4 * 3), "fedamole": ("experts_", 2 / 4, 4 * 2)}  # share, bytes of the index
    part, share, index = rows[name]
    sizes = [tree_bytes(leaf) * (share if part in jax.tree_util.keystr(path) else 1) for path, leaf in flat]
    assert metrics["clients"]["download_bytes"].tolist() == [sum(sizes)]
    assert metrics["clients"]["upload_bytes"].tolist() == [sum(sizes) + index]


@pytest.mark.parametrize("name", ["fedmoe", "fedamole"])
def test_the_server_of_experts_by_hand(name, spec_of):
    """Owners' weights are scaled to one, what nobody trains stays, and a clipped upload is clipped as a whole."""
    leaf = {"fedmoe": ("layers", "moe", "slot"), "fedamole": ("layers", "attention", "q_proj")}[name]
    table, other = {"fedmoe": ("lora_a", "../x"), "fedamole": ("experts_a", "lora_a")}[name]

    def tree(rows, whole):
        top, middle, last = leaf
        return {top: {middle: {last: {table: rows}}, "other": {other: whole}}}

    rng = np.random.default_rng(1)
    old, whole = rng.normal(size=(2, 4, 3)).astype(np.float32), np.zeros(2, np.float32)
    rows = rng.normal(size=(3, 2, 2, 3)).astype(np.float32)
    changes = rng.normal(size=(3, 2)).astype(np.float32)
    examples = np.array([2, 3, 5], np.float32)
    weights = examples / 10
    index = {"fedmoe": [[[0, 1], [2, 1]], [[1, 0], [0, 1]], [[3, 1], [1, 0]]], "fedamole": [[0, 1], [1, 2], [1, 0]]}
    experts_of = [lambda layer, c=c: c[layer] if name == "fedmoe" else c for c in index[name]]
    uploads = Upload(tree(rows, changes), {"expert_index": jnp.array(index[name], jnp.int32)})
    one = of_client(uploads, 0)
    for clip_norm in (0.0, 0.5):
        spec = spec_of(name, settings=Settings(clip_norm=clip_norm))
        ours, extra = aggregate(spec, 3, one, ServerState(tree(old, whole), {}), uploads, jnp.array(examples))
        norms = np.sqrt((rows**2).sum((1, 2, 3)) + (changes**2).sum(1))
        factor = np.ones(3) if clip_norm == 0 else clip_norm / norms  # all are above 0.5
        clipped = rows * factor[:, None, None, None]
        moved = average(np.zeros_like(old), experts_of, clipped, weights)
        expected = tree(old + moved, weights @ (changes * factor[:, None]))
        tree_map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ours, expected)
        assert extra == {}


def plain_projection(x, kernel, leaves, rank, scale):
    """Token by token: the common LoRA, and the two experts whose A x lie closest to P x."""
    y = np.empty((len(x), kernel.shape[1]))
    for t, token in enumerate(x):
        y[t] = token @ kernel + scale * token @ leaves["lora_a"] @ leaves["lora_b"]
        embeddings = [token @ a for a in leaves["experts_a"]]
        shares = softmax(np.array([embedding @ (token @ leaves["router"]) for embedding in embeddings]) / np.sqrt(rank))
        best = np.argsort(-shares)[:2]
        for e in best:
            y[t] += shares[e] / shares[best].sum() * scale * embeddings[e] @ leaves["experts_b"][e]
    return y


def projection(lora):
    return Projection(4, False, AdapterConfig(lora, projection=make_method("fedamole").projection))


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_a_token_goes_to_the_two_lora_experts_that_it_is_closest_to(experts):
    rng = np.random.default_rng(experts)
    shapes = dict(lora_a=(6, 3), lora_b=(3, 4), experts_a=(experts, 6, 3), experts_b=(experts, 3, 4), router=(6, 3))
    leaves = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    kernel, x = rng.normal(size=(6, 4)), rng.normal(size=(2, 7, 6))
    variables = tree_map(jnp.float32, {"params": {"kernel": kernel}, "adapters": leaves})
    expected = plain_projection(x.reshape(14, 6), kernel, leaves, 3, 2.0).reshape(2, 7, 4)
    ours = projection(LoraConfig(rank=3, alpha=6.0)).apply(variables, jnp.float32(x))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_dropout_of_lora_experts_acts_in_training_only_and_not_on_the_router():
    """The router is sure of expert 0: every token is a dropped x times A_0 B_0. None goes to expert 1, whose B is 0.

    If the input of the router were dropped as well, it would be sure of expert 1 for many.
    """
    rng = np.random.default_rng(0)
    a, b, router, x = rng.normal(size=(6, 3)), rng.normal(size=(3, 4)), rng.normal(size=(6, 3)), np.ones(6)
    router *= 1e4 / ((x @ a) @ (x @ router))
    leaves = {"experts_a": np.stack([a, -a]), "experts_b": np.stack([b, 0 * b]), "router": router}
    leaves |= {"lora_a": 0 * a, "lora_b": 0 * b}
    variables = tree_map(jnp.float32, {"params": {"kernel": np.zeros((6, 4))}, "adapters": leaves})
    dropping = projection(LoraConfig(rank=3, alpha=3.0, dropout=0.5))
    tokens = jnp.ones((400, 6))
    np.testing.assert_allclose(dropping.apply(variables, tokens)[0], x @ a @ b, rtol=1e-4)
    trained = dropping.apply(variables, tokens, rngs={"dropout": jax.random.PRNGKey(0)})
    dropped = 2.0 * np.array(np.meshgrid(*6 * [[0, 1]])).reshape(6, 64).T  # every x that dropout can make
    distance = np.linalg.norm(trained[:, None] - dropped @ a @ b, axis=-1)
    assert (distance.min(1) < 1e-3).all() and len(set(distance.argmin(1))) > 50
    assert (np.linalg.norm(trained, axis=-1) < 1e-3).mean() < 0.05  # 1 in 64 loses all of its x


def test_fedamole_over_two_rounds(run_rounds, spec_of, params, batches, examples):
    """Client i has the experts i and i + 1 of 4 in every projection; in the first round nobody has expert 3."""
    spec, cohorts = spec_of("fedamole"), [(0, 1), (1, 3)]
    _, first, states, _ = run_rounds(spec, cohorts)
    shared = begin = tree_map(np.asarray, first.server.shared)

    def rows_of(client, tree):
        def rows(path, leaf):
            return leaf[:, [client, (client + 1) % 4]] if "experts_" in jax.tree_util.keystr(path) else leaf

        return jax.tree_util.tree_map_with_path(rows, tree)

    for cohort, state in zip(cohorts, states, strict=True):
        trained = [plain_client(spec.model, params, rows_of(i, shared), of_client(batches, i)) for i in cohort]
        weights = shares(examples, cohort)
        experts_of = [lambda layer, i=i: [i, (i + 1) % 4] for i in cohort]

        def combined(path, old, *new, experts_of=experts_of, weights=weights):
            if "experts_" in jax.tree_util.keystr(path):
                return average(old, experts_of, new, weights)
            return sum(weight * leaf for weight, leaf in zip(weights, new, strict=True))

        shared = jax.tree_util.tree_map_with_path(combined, shared, *trained)
        assert_close(state.server.shared, shared, begin)
    once = states[0].server.shared["layers"]["attention"]["q_proj"]
    start = begin["layers"]["attention"]["q_proj"]
    np.testing.assert_array_equal(once["experts_a"][:, 3], start["experts_a"][:, 3])
    assert all((np.abs(once[leaf] - start[leaf]) > 1e-5).any() for leaf in ("experts_a", "experts_b", "router"))


def test_fedamole_whose_clients_have_every_expert_is_fedavg_of_its_layer(run_rounds, spec_of):
    spec = spec_of("fedamole", {"num_experts": 3, "client_experts": 3})
    plain = MethodSpec(spec.model, spec.method._replace(client=ClientRule(), server=ServerRule()))
    (_, first, (ours,), _), (_, _, (fedavg,), _) = (run_rounds(each, [range(N)]) for each in (spec, plain))
    assert_close(ours.server.shared, fedavg.server.shared, first.server.shared)


@pytest.mark.parametrize("name", ["fedmoe", "fedamole"])
def test_experts_cannot_be_combined_by_a_robust_rule(name, model):
    with pytest.raises(InputError, match="config.server.aggregation is 'median': .* averages .* must be mean"):
        make_method(name).check(model, Settings(aggregation="median"))


def test_no_client_has_more_experts_than_there_are():
    with pytest.raises(InputError, match="client_experts is 5: must be at most num_experts, 4"):
        make_method("fedamole", {"client_experts": 5})
