"""FLoRA, FlexLoRA and HetLoRA: clients with different ranks, written out by hand."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import optax
import pytest

from flex_jax.errors import InputError
from flex_jax.federated.aggregation import weighted_mean
from flex_jax.federated.client import LocalTraining, client_context, client_round, client_variables
from flex_jax.federated.compression import compress, init_residual, tree_bytes
from flex_jax.federated.method import ClientContext, Download, ServerContext, Settings, Trained, Upload
from flex_jax.federated.state import NO_CLIENTS, ClientState, ServerState
from flex_jax.methods import make_method
from flex_jax.methods._ranks import unpadded_bytes
from tests.federated.fixtures import OPTIMIZER
from tests.federated.helpers import (
    LEARNING_RATE,
    STEPS,
    assert_close,
    gradient,
    mean,
    of_client,
    plain_client,
    shares,
    train,
    tree_map,
)

NAMES = ["flexlora", "flora", "hetlora"]
RANKS = (1, 2)  # of the clients 0 and 2, and of 1 and 3; that of the LoRA is 2
UNEQUAL = dict.fromkeys(("flexlora", "flora"), {"ranks": RANKS})
UNEQUAL |= {"hetlora": {"ranks": RANKS, "lambda_": 0.0, "gamma": 1.0}}  # without pruning
SCALE = 2.0  # alpha / rank of the fixtures


def over_pairs(function, *trees):
    """`function` of the (A, B) of each projection, as {projection: result}."""
    attention = [tree["layers"]["attention"] for tree in trees]
    return {name: function(*((t[name]["lora_a"], t[name]["lora_b"]) for t in attention)) for name in attention[0]}


def as_tree(pairs):
    return {"layers": {"attention": {name: {"lora_a": a, "lora_b": b} for name, (a, b) in pairs.items()}}}


def columns(tree, rank):
    """The first `rank` columns of A and rows of B: smaller arrays, no zeros."""
    return as_tree(over_pairs(lambda pair: (pair[0][..., :rank], pair[1][..., :rank, :]), tree))


def padded(tree, full):
    def pad(pair):
        none, spare = (0, 0), (0, full - pair[0].shape[-1])
        return np.pad(pair[0], (none, none, spare)), np.pad(pair[1], (none, spare, none))

    return as_tree(over_pairs(pad, tree))


def products(tree):
    return over_pairs(lambda pair: np.asarray(pair[0]) @ np.asarray(pair[1]), tree)


def of_rank(model, rank):
    """The model with LoRA really of that rank, and the same scale."""
    return model.clone(
        adapters=replace(model.adapters, lora=replace(model.adapters.lora, rank=rank, alpha=SCALE * rank))
    )


def train_by_hand(model, params, shared, batches, client, rank):
    """The pairs that a client of that rank makes of the shared ones, of that rank."""
    return plain_client(of_rank(model, rank), params, columns(shared, rank), of_client(batches, client))


def merged_into(params, changes):
    """The backbone with scale * change added to its kernels."""
    params = tree_map(lambda leaf: leaf, params)
    for name, change in changes.items():
        params["layers"]["attention"][name]["kernel"] += SCALE * change
    return params


def merged_of(server):
    return server.extra["merged"]["layers"]["attention"]


def random_pairs(seed, rank, inputs=6, outputs=5, layers=2):
    rng = np.random.default_rng(seed)
    shapes = (layers, inputs, rank), (layers, rank, outputs)
    pairs = {
        name: tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes) for name in ("q_proj", "v_proj")
    }
    return as_tree(pairs)


def server_step(name, shared, trained, ranks, weights):
    """The server's state after the round of clients who have trained these pairs, arrays of their own ranks."""
    rule, full = make_method(name).server, shared["layers"]["attention"]["q_proj"]["lora_a"].shape[-1]
    starts = [padded(columns(shared, rank), full) for rank in ranks]
    deltas = [tree_map(np.subtract, padded(own, full), start) for own, start in zip(trained, starts, strict=True)]
    uploads = Upload(tree_map(lambda *leaves: np.stack(leaves), *deltas), {"rank": np.array(ranks, np.int32)})
    weights = np.array(weights, np.float32)
    context = ServerContext(uploads, weights, partial(mean_of, default=weights), len(ranks))
    return rule.update(ServerState(shared, rule.init_extra(shared, jax.random.PRNGKey(0))), context)


def mean_of(stacked, weights=None, *, default):
    return weighted_mean(stacked, default if weights is None else weights)


@pytest.mark.parametrize("name", NAMES)
def test_a_client_trains_as_one_whose_lora_really_has_its_rank(name, prepared, spec_of, model, params, batches):
    """So the padding is nothing: it stays zero under clipping, AdamW and weight decay."""
    spec = spec_of(name, UNEQUAL[name])
    frozen, state = prepared(spec)

    @jax.jit
    def train(client, data):
        context = client_context(spec, state.server, client, round=0, learning_rate=LEARNING_RATE, num_steps=STEPS)
        return client_round(LocalTraining(spec, OPTIMIZER), frozen, context, data, jax.random.PRNGKey(0))

    for client, rank in ((0, 1), (1, 2), (2, 1)):
        update = train(of_client(state.clients, client), of_client(batches, client))
        start, delta = columns(state.server.shared, rank), update.upload.delta
        expected = tree_map(np.subtract, train_by_hand(model, params, start, batches, client, rank), start)
        assert_close(columns(delta, rank), expected, tree_map(np.zeros_like, expected), bound=1e-3)
        assert optax.tree.norm(tree_map(np.subtract, delta, padded(columns(delta, rank), 2))) == 0
        assert update.upload.extra["rank"] == rank == update.state.extra["rank"]


@pytest.mark.parametrize("name", NAMES)
def test_only_a_clients_own_ranks_are_counted_as_sent(name, run_rounds, spec_of):
    _, first, _, (first_round, second_round) = run_rounds(spec_of(name, UNEQUAL[name]), [(0, 1), (2, 3)])
    assert first.clients.extra["rank"].tolist() == [1, 2, 1, 2]
    one = tree_bytes(columns(first.server.shared, 1))
    for metrics in (first_round, second_round):
        assert metrics["clients"]["upload_bytes"].tolist() == [one + 4, 2 * one + 4]
    assert first_round["clients"]["download_bytes"].tolist() == [one, 2 * one]
    stacked = [3 * one, 3 * one]  # of the ranks 1 and 2
    assert second_round["clients"]["download_bytes"].tolist() == (stacked if name == "flora" else [one, 2 * one])


def test_ranks_of_compressed_pairs_are_counted_likewise():
    """A byte for an entry and a scale for a factor with int8; the entries of topk are those of the padded arrays."""
    pairs, key = random_pairs(0, 4), jax.random.PRNGKey(0)
    for kind, expected in (("none", 4 * 88), ("bfloat16", 2 * 88), ("int8", 88 + 4 * 4), ("topk", 8 * 2 * (12 + 10))):
        packed, _ = compress(pairs, init_residual(pairs, kind), key, compression=kind, fraction=0.25)
        assert unpadded_bytes(Upload(packed, {"rank": np.int32(2)}), 4, 2).tolist() == expected + 4


def test_stacked_ranks_of_more_than_four_gib_are_counted_exactly():
    """FLoRA's download: 4,096 clients of rank 1, each of 1.125 MiB; 32 bits would make 536,870,912 of their stack."""
    sizes = {"lora_a": (32, 4096, 1), "lora_b": (32, 1, 5120)}
    pair = {name: jax.ShapeDtypeStruct(size, np.float32) for name, size in sizes.items()}
    assert tree_bytes(pair) == 9 * 2**17
    client = ClientState({}, {}, {"rank": np.int32(1), "client_id": np.int32(0)}, {})

    def download_bytes(stacked):
        context = ClientContext(Download({"q_proj": pair}, {}), {"stacked_ranks": stacked}, client, 1, 1e-2, STEPS)
        return make_method("flora").client.wire_bytes(context, Upload({}, {"rank": np.int32(1)}))[1]

    counts = jax.jit(jax.vmap(download_bytes))(np.array([0, 4, 4096], np.int32))
    assert jax.device_get(counts).tolist() == [9 * 2**17, 36 * 2**17, 4_831_838_208]


@pytest.mark.parametrize("name", NAMES)
def test_clients_and_the_aggregated_model_have_the_ranks_they_have(name, run_rounds, spec_of, model, params):
    spec, tokens = spec_of(name, UNEQUAL[name]), np.arange(8)[None]
    frozen, _, (after,), _ = run_rounds(spec, [(0, 1)])

    def logits(client):
        return spec.model.apply(client_variables(spec, frozen, after.server, client), tokens).logits

    clients = [logits(of_client(after.clients, client)) for client in (0, 1)]
    aggregated = logits(NO_CLIENTS)
    np.testing.assert_array_equal(clients[1], aggregated)
    if name == "flora":  # merged into the backbone: the same for all
        expected = model.apply({"params": merged_into(params, merged_of(after.server))}, tokens).logits
        np.testing.assert_array_equal(clients[0], aggregated)
        np.testing.assert_allclose(aggregated, expected, atol=1e-5)
    else:
        small = columns(after.server.shared, 1)
        expected = of_rank(model, 1).apply({"params": params, "adapters": small}, tokens).logits
        np.testing.assert_allclose(clients[0], expected, atol=1e-5)
        assert np.abs(clients[0] - aggregated).max() > 1e-3
        expected = model.apply({"params": params, "adapters": after.server.shared}, tokens).logits
        np.testing.assert_allclose(aggregated, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["flexlora", "flora"])
@pytest.mark.parametrize(
    ("section", "key", "value", "allowed"),
    [
        ("server", "aggregation", "median", "must be mean"),
        ("server", "clip_norm", 1.0, "must be 0"),
        ("client", "compression", "topk", "must be none or bfloat16 or int8"),
    ],
)
def test_stacks_refuse_what_works_on_factors(name, section, key, value, allowed, model):
    with pytest.raises(InputError, match=rf"config\.{section}\.{key} is {value!r}: {allowed}, because it stacks"):
        make_method(name).check(model, Settings(**{key: value}))


def test_flora_merges_the_stack_over_two_rounds(run_rounds, spec_of, model, params, batches, examples):
    spec, cohorts = spec_of("flora", UNEQUAL["flora"]), [(0, 1), (1, 2)]
    frozen, first, states, _ = run_rounds(spec, cohorts)
    merged, server = tree_map(np.zeros_like, products(first.server.shared)), first.server
    for number, (cohort, state) in enumerate(zip(cohorts, states, strict=True)):
        weights = shares(examples, cohort)
        backbone, added = merged_into(params, merged), []
        for i in cohort:
            rank, start = RANKS[i % 2], first.server.shared
            if number == 1:  # fresh pairs, drawn by the clients themselves
                client = of_client(first.clients, i)
                context = client_context(
                    spec, server, client, round=number, learning_rate=LEARNING_RATE, num_steps=STEPS
                )
                start = spec.method.client.init_trained(context, None).shared
                for name, (a, b) in over_pairs(lambda pair: pair, columns(start, rank)).items():
                    assert 0.1 < np.abs(a).max() < a.shape[1] ** -0.5 and np.abs(b).max() == 0, name
            added.append((start, products(train_by_hand(model, backbone, start, batches, i, rank))))
        merged = tree_map(np.add, merged, mean([product for _, product in added], weights))
        assert_close(merged_of(state.server), merged, tree_map(np.zeros_like, merged), bound=1e-3)
        assert optax.tree.norm(state.server.shared) == 0
        server = state.server
    (one, _), (other, _) = added
    q = [columns(start, 1)["layers"]["attention"]["q_proj"]["lora_a"] for start in (one, other)]
    assert np.abs(q[0] - q[1]).max() > 0.1  # of two clients


def test_flora_stacks_any_pairs_exactly():
    """The adapter that all start with, whose product need not be zero, is merged with the rest."""
    shared, ranks, weights = random_pairs(0, 4), (1, 4, 2), (0.2, 0.3, 0.5)
    trained = [random_pairs(seed, rank) for seed, rank in enumerate(ranks, 1)]
    after = server_step("flora", shared, trained, ranks, weights)
    expected = mean([products(own) for own in trained], weights)
    for name, product in over_pairs(lambda pair: pair, shared).items():
        merged = merged_of(after)[name]
        np.testing.assert_allclose(merged, expected[name], rtol=1e-4, atol=1e-5)
        assert merged.shape == (*product[0].shape[:-1], product[1].shape[-1])
    assert after.extra["stacked_ranks"] == 7 and optax.tree.norm(after.shared) == 0


@pytest.mark.parametrize(("name", "hparams"), [("flexlora", {}), ("flora", {}), ("hetlora", {"gamma": 1.0})])
def test_one_client_of_full_rank_is_fedavg(name, hparams, run_rounds, spec_of):
    """Its product is what it trained; without pruning."""
    _, first, (ours,), _ = run_rounds(spec_of(name, hparams), [(2,)])
    _, _, (fedavg,), _ = run_rounds(spec_of("fedavg"), [(2,)])
    expected = products(fedavg.server.shared)
    got = merged_of(ours.server) if name == "flora" else products(ours.server.shared)
    assert_close(got, expected, products(first.server.shared), bound=1e-4)
    if name == "hetlora":
        assert_close(ours.server.shared, fedavg.server.shared, first.server.shared, bound=1e-5)


def test_flexlora_distributes_the_best_pair_of_every_rank():
    shared, ranks, weights = random_pairs(0, 4), (1, 4, 2), (0.2, 0.3, 0.5)
    trained = [random_pairs(seed, rank) for seed, rank in enumerate(ranks, 1)]
    after = server_step("flexlora", shared, trained, ranks, weights).shared
    average = mean([products(own) for own in trained], weights)
    for rank in (1, 2, 4):
        cut = products(columns(after, rank))
        for name, dense in average.items():
            u, s, v = np.linalg.svd(dense, full_matrices=False)
            best = u[..., :rank] * s[:, None, :rank] @ v[:, :rank]
            np.testing.assert_allclose(cut[name], best, rtol=1e-3, atol=1e-4)
    for name, (a, b) in over_pairs(lambda pair: pair, after).items():
        np.testing.assert_allclose(a.mT @ a, np.broadcast_to(np.eye(4), (2, 4, 4)), atol=1e-5)
        s = np.linalg.svd(average[name], compute_uv=False)[:, :4]
        np.testing.assert_allclose(np.linalg.norm(b, axis=-1), s, rtol=1e-4)


def test_flexlora_pads_if_a_matrix_has_fewer_ranks_than_its_lora():
    shared, trained = random_pairs(0, 7), [random_pairs(1, 7)]
    after = server_step("flexlora", shared, trained, (7,), (1.0,)).shared
    assert tree_map(np.shape, after) == tree_map(np.shape, shared)
    for name, product in products(after).items():
        np.testing.assert_allclose(product, products(trained[0])[name], rtol=1e-3, atol=1e-4)


def test_flexlora_over_two_rounds(run_rounds, spec_of, model, params, batches, examples):
    cohorts = [(0, 1), (1, 2)]
    _, first, states, _ = run_rounds(spec_of("flexlora", UNEQUAL["flexlora"]), cohorts)
    shared = first.server.shared
    for cohort, state in zip(cohorts, states, strict=True):
        trained = [train_by_hand(model, params, shared, batches, i, RANKS[i % 2]) for i in cohort]
        best = {}
        for name, dense in mean([products(own) for own in trained], shares(examples, cohort)).items():
            u, s, v = np.linalg.svd(dense, full_matrices=False)
            best[name] = u[..., :2] * s[:, None, :2] @ v[:, :2]
        assert_close(products(state.server.shared), best, tree_map(np.zeros_like, best), bound=1e-3)
        shared = state.server.shared  # the same products are those of many pairs


def norm_product(tree, rank):
    """||A[:, rank:]|| ||B[rank:]|| of each layer and projection, summed."""
    return sum(
        np.linalg.norm(a[layer, :, rank:]) * np.linalg.norm(b[layer, rank:])
        for a, b in over_pairs(lambda pair: pair, tree).values()
        for layer in range(len(a))
    )


def tail_gradient(tree, rank):
    """The gradient of `norm_product`: ||B|| A / ||A|| and ||A|| B / ||B||, zero if a norm is zero."""

    def of_pair(pair):
        a, b = (np.array(factor) for factor in pair)
        a[:, :, :rank], b[:, :rank] = 0, 0
        norms = [np.linalg.norm(factor, axis=(1, 2), keepdims=True) for factor in (a, b)]
        safe = [np.where(norm == 0, 1, norm) for norm in norms]
        return norms[1] * a / safe[0], norms[0] * b / safe[1]

    return as_tree(over_pairs(of_pair, tree))


def hetlora_client(model, params, start, data, rank, gamma, strength):
    """(pairs, of the rank that is left; that rank)."""
    fewer, start = max(1, int(gamma * rank)), columns(start, rank)

    def penalised(pairs, tokens, mask):
        g = gradient(of_rank(model, rank), params, pairs, tokens, mask)
        return tree_map(lambda g, penalty: g + strength * penalty, g, tail_gradient(pairs, fewer))

    pairs = train(start, penalised, zip(*data, strict=True))
    left = fewer if norm_product(pairs, fewer) < norm_product(start, fewer) else rank
    return columns(pairs, left), left


def norms_of(trained):
    """||A B||_F of all matrices of each client."""
    return np.array([np.sqrt(sum((p**2).sum() for p in products(own).values())) for own in trained])


@pytest.mark.parametrize("strength", [0.5, 20.0])
def test_hetlora_over_three_rounds(strength, run_rounds, spec_of, model, params, batches):
    """A strong penalty prunes. A weak one, which nevertheless shows, does not."""
    spec = spec_of("hetlora", {"ranks": (2, 2, 1), "gamma": 0.5, "lambda_": strength})
    cohorts, ranks = [(0, 1), (1, 2), (0, 1)], [2, 2, 1, 2]
    _, first, states, _ = run_rounds(spec, cohorts)
    shared, seen = first.server.shared, []
    for cohort, state in zip(cohorts, states, strict=True):
        trained = []
        for i in cohort:
            own, ranks[i] = hetlora_client(model, params, shared, of_client(batches, i), ranks[i], 0.5, strength)
            trained.append(own)
        norms = norms_of(trained)
        average = mean([padded(own, 2) for own in trained], norms / norms.sum())
        if max(ranks[i] for i in cohort) == 1:  # nobody's second rank: it stays
            unchanged = tree_map(np.subtract, shared, padded(columns(shared, 1), 2))
            average = tree_map(np.add, average, unchanged)
        assert_close(state.server.shared, average, first.server.shared, bound=1e-3)
        shared = state.server.shared
        assert state.clients.extra["rank"].tolist() == ranks
        seen.append(list(ranks))
    assert seen[0] == [2, 2, 1, 2]  # B starts at zero, and so does the product of norms
    assert (seen[-1] != seen[0]) == (strength > 1)


@pytest.mark.parametrize(("rank", "gamma", "left"), [(4, 0.99, 3), (4, 0.5, 2), (3, 0.5, 1), (1, 0.5, 1), (4, 1.0, 4)])
def test_hetlora_prunes_to_the_decayed_rank(rank, gamma, left):
    """If the last ranks have shrunk; otherwise it prunes nothing."""
    shared = padded(columns(random_pairs(0, 4), rank), 4)
    client = ClientState({}, {}, {"rank": np.int32(rank)}, {})
    context = ClientContext(Download(shared, {}), {}, client, 0, LEARNING_RATE, 1)
    for factor, expected in ((0.9, left), (1.1, rank)):
        trained = Trained(shared=tree_map(lambda leaf, factor=factor: factor * leaf, shared), personal={})
        upload, _, extra = make_method("hetlora", {"gamma": gamma}).client.make_result(context, trained)
        assert extra["rank"] == upload.extra["rank"] == expected
        change = tree_map(lambda leaf, factor=factor: (factor - 1) * leaf, shared)
        uploaded = padded(columns(change, expected), 4)
        tree_map(partial(np.testing.assert_allclose, atol=1e-6), upload.delta, uploaded)


def test_hetlora_weighs_clients_by_the_norms_of_their_products():
    shared, ranks = random_pairs(0, 4), (1, 3, 2)
    trained = [random_pairs(seed, rank) for seed, rank in enumerate(ranks, 1)]
    trained[0] = tree_map(lambda leaf: 2 * leaf, trained[0])
    after = server_step("hetlora", shared, trained, ranks, (0.2, 0.3, 0.5)).shared
    norms = norms_of(trained)
    expected = mean([padded(own, 4) for own in trained], norms / norms.sum())
    last = tree_map(np.subtract, shared, padded(columns(shared, 3), 4))  # nobody's fourth rank
    tree_map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), after, tree_map(np.add, expected, last))


def test_hetlora_stays_finite_if_no_client_has_moved():
    shared = as_tree(over_pairs(lambda pair: (pair[0], 0 * pair[1]), random_pairs(0, 2)))
    after = server_step("hetlora", shared, [shared, shared], (2, 2), (0.5, 0.5)).shared
    tree_map(partial(np.testing.assert_allclose, rtol=1e-6), after, shared)
