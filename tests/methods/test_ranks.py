"""FLoRA, FlexLoRA and HetLoRA: clients with ranks of their own, written out by hand."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import optax
import pytest

from flex_jax.errors import InputError
from flex_jax.federated.aggregation import weighted_mean
from flex_jax.federated.client import client_round, collections, receive
from flex_jax.federated.compression import compress, init_residual, tree_bytes
from flex_jax.federated.method import Arrived, ClientSettings, Received, Settings
from flex_jax.federated.start import NO_CLIENTS
from flex_jax.federated.state import ClientState
from flex_jax.methods import METHODS
from flex_jax.methods.ranks import own_bytes
from tests.methods.test_paper_methods import RATE, assert_close, gradient, plain_client

NAMES = ["flexlora", "flora", "hetlora"]
RANKS = (1, 2)  # of the clients 0 and 2, and of 1 and 3; the LoRA's own is 2
UNEQUAL = Settings(ClientSettings(ranks=RANKS, rank_lambda=0.0, rank_decay=1.0))
SCALE = 2.0  # alpha / rank of the fixtures
tree_map = jax.tree.map


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


def weighted(trees, weights):
    return tree_map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *trees)


def of_rank(model, rank):
    """The model with LoRA really of that rank, and the same scale."""
    return model.clone(
        adapters=replace(model.adapters, lora=replace(model.adapters.lora, rank=rank, alpha=SCALE * rank))
    )


def train_by_hand(model, params, shared, batches, client, rank):
    """A client of that rank from the shared pairs: its own pairs, of that rank."""
    return plain_client(of_rank(model, rank), params, columns(shared, rank), [leaf[client] for leaf in batches])


def merged_into(params, changes):
    """The backbone with scale * change added to its kernels."""
    params = tree_map(lambda leaf: leaf, params)
    for name, change in changes.items():
        params["layers"]["attention"][name]["kernel"] += SCALE * change
    return params


def merged_of(kept):
    return kept["merged"]["layers"]["attention"]


def random_pairs(seed, rank, inputs=6, outputs=5, layers=2):
    rng = np.random.default_rng(seed)
    shapes = (layers, inputs, rank), (layers, rank, outputs)
    pairs = {
        name: tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes) for name in ("q_proj", "v_proj")
    }
    return as_tree(pairs)


def server_step(name, shared, trained, ranks, weights):
    """The shared tree and what is kept after the server's part of a round, of clients who have trained these pairs,
    arrays of their own ranks."""
    rule, full = METHODS[name].server, shared["layers"]["attention"]["q_proj"]["lora_a"].shape[-1]
    starts = [padded(columns(shared, rank), full) for rank in ranks]
    deltas = [tree_map(np.subtract, padded(own, full), start) for own, start in zip(trained, starts, strict=True)]
    uploads = {"delta": tree_map(lambda *leaves: np.stack(leaves), *deltas), "rank": np.array(ranks, np.int32)}
    weights = np.array(weights, np.float32)
    arrived = Arrived(uploads, weights, partial(mean_of, default=weights), len(ranks), Settings())
    return rule.update(shared, rule.init(shared, Settings(), jax.random.PRNGKey(0)), arrived)


def mean_of(stacked, weights=None, *, default):
    return weighted_mean(stacked, default if weights is None else weights)


def run(name, prepared, one_round, cohorts, settings):
    """(frozen, first state, states after each round, metrics of each round)."""
    frozen, first = prepared(name, settings=settings)
    state, states, measured = first, [], []
    for cohort in cohorts:
        state, metrics = one_round(name, frozen, state, cohort=cohort, settings=settings, **RATE)
        states.append(state)
        measured.append(metrics)
    return frozen, first, states, measured


@pytest.mark.parametrize("name", NAMES)
def test_a_client_trains_as_one_whose_lora_really_has_its_rank(name, prepared, recipe_of, model, params, batches):
    """So the padding is nothing: it stays zero under clipping, AdamW and weight decay."""
    frozen, state = prepared(name, settings=UNEQUAL)
    recipe = recipe_of(name, UNEQUAL)

    @jax.jit
    def train(client, own):
        received = receive(recipe, state.server, client, learning_rate=1e-2, steps=3)
        numbers = {"weight_decay": 0.1, "clip_norm": 1.0}
        return client_round(recipe, received, frozen, own, jax.random.PRNGKey(0), **numbers)

    for number, rank in ((0, 1), (1, 2), (2, 1)):
        update = train(*(tree_map(lambda leaf, n=number: leaf[n], tree) for tree in (state.clients, batches)))
        start = columns(state.server.shared, rank)
        expected = tree_map(np.subtract, train_by_hand(model, params, start, batches, number, rank), start)
        assert_close(columns(update.upload["delta"], rank), expected, tree_map(np.zeros_like, expected), bound=1e-3)
        beyond = tree_map(np.subtract, update.upload["delta"], padded(columns(update.upload["delta"], rank), 2))
        assert optax.tree.norm(beyond) == 0
        assert update.upload["rank"] == rank == update.state.kept["rank"]


@pytest.mark.parametrize("name", NAMES)
def test_only_a_clients_own_ranks_are_counted_as_sent(name, prepared, one_round):
    frozen, first, _, (first_round, second_round) = run(name, prepared, one_round, [(0, 1), (2, 3)], UNEQUAL)
    assert first.clients.kept["rank"].tolist() == [1, 2, 1, 2]
    one = tree_bytes(columns(first.server.shared, 1))
    for metrics in (first_round, second_round):
        assert metrics["clients"]["upload_bytes"].tolist() == [one + 4, 2 * one + 4]
    assert first_round["clients"]["download_bytes"].tolist() == [one, 2 * one]
    stacked = [3 * one, 3 * one]  # of the ranks 1 and 2
    assert second_round["clients"]["download_bytes"].tolist() == (stacked if name == "flora" else [one, 2 * one])


def test_ranks_of_compressed_pairs_are_counted_likewise():
    """A byte an entry and a scale a factor with int8; the entries of topk, which are those of the padded arrays."""
    pairs, key = random_pairs(0, 4), jax.random.PRNGKey(0)
    for kind, expected in (("none", 4 * 88), ("bfloat16", 2 * 88), ("int8", 88 + 4 * 4), ("topk", 8 * 2 * (12 + 10))):
        packed, _ = compress(pairs, init_residual(pairs, kind), key, compression=kind, fraction=0.25)
        assert own_bytes({"delta": packed, "rank": np.int32(2)}, 4, 2) == expected + 4


@pytest.mark.parametrize("name", NAMES)
def test_clients_and_the_aggregated_model_have_the_ranks_they_have(name, prepared, one_round, recipe_of, model, params):
    frozen, _, (after,), _ = run(name, prepared, one_round, [(0, 1)], UNEQUAL)
    recipe, tokens = recipe_of(name, UNEQUAL), np.arange(8)[None]

    def logits(client):
        return recipe.model.apply(collections(recipe, frozen, after.server, client), tokens).logits

    clients = [logits(tree_map(lambda leaf, n=number: leaf[n], after.clients)) for number in (0, 1)]
    aggregated = logits(NO_CLIENTS)
    np.testing.assert_array_equal(clients[1], aggregated)
    if name == "flora":  # merged into the backbone: the same for all
        expected = model.apply({"params": merged_into(params, merged_of(after.server.kept))}, tokens).logits
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
def test_stacks_refuse_what_works_on_factors(name, section, key, value, allowed, prepared):
    settings = Settings()
    settings = settings._replace(**{section: getattr(settings, section)._replace(**{key: value})})
    with pytest.raises(InputError, match=rf"config\.{section}\.{key} is {value!r}: {name} .*{allowed}"):
        prepared(name, settings=settings)


def test_flora_merges_the_stack_over_two_rounds(prepared, one_round, recipe_of, model, params, batches, examples):
    cohorts = [(0, 1), (1, 2)]
    frozen, first, states, _ = run("flora", prepared, one_round, cohorts, UNEQUAL)
    merged = tree_map(np.zeros_like, products(first.server.shared))
    recipe, server = recipe_of("flora", UNEQUAL), first.server
    for number, (cohort, state) in enumerate(zip(cohorts, states, strict=True)):
        weights = examples[list(cohort)] / examples[list(cohort)].sum()
        backbone, added = merged_into(params, merged), []
        for i in cohort:
            rank, start = RANKS[i % 2], first.server.shared
            if number == 1:  # fresh pairs, drawn by the clients themselves
                client = tree_map(lambda leaf, i=i: leaf[i], first.clients)
                received = receive(recipe, server, client, round=number)
                start = recipe.method.client.begin(received, None)["shared"]
                for name, (a, b) in over_pairs(lambda pair: pair, columns(start, rank)).items():
                    assert 0.1 < np.abs(a).max() < a.shape[1] ** -0.5 and np.abs(b).max() == 0, name
            added.append((start, products(train_by_hand(model, backbone, start, batches, i, rank))))
        merged = tree_map(np.add, merged, weighted([product for _, product in added], weights))
        assert_close(merged_of(state.server.kept), merged, tree_map(np.zeros_like, merged), bound=1e-3)
        assert optax.tree.norm(state.server.shared) == 0
        server = state.server
    (one, _), (other, _) = added
    q = [columns(start, 1)["layers"]["attention"]["q_proj"]["lora_a"] for start in (one, other)]
    assert np.abs(q[0] - q[1]).max() > 0.1  # of two clients


def test_flora_stacks_any_pairs_exactly():
    """The adapter that all start with, whose product need not be zero, is merged with the rest."""
    shared, ranks, weights = random_pairs(0, 4), (1, 4, 2), (0.2, 0.3, 0.5)
    trained = [random_pairs(seed, rank) for seed, rank in enumerate(ranks, 1)]
    after, kept = server_step("flora", shared, trained, ranks, weights)
    expected = weighted([products(own) for own in trained], weights)
    for name, product in over_pairs(lambda pair: pair, shared).items():
        merged = merged_of(kept)[name]
        np.testing.assert_allclose(merged, expected[name], rtol=1e-4, atol=1e-5)
        assert merged.shape == (*product[0].shape[:-1], product[1].shape[-1])
    assert kept["stacked_ranks"] == 7 and optax.tree.norm(after) == 0


@pytest.mark.parametrize("name", NAMES)
def test_one_client_of_full_rank_is_fedavg(name, prepared, one_round):
    """Its product is what it trained; without pruning."""
    full = Settings(ClientSettings(rank_decay=1.0))
    _, first, (ours,), _ = run(name, prepared, one_round, [(2,)], full)
    _, _, (fedavg,), _ = run("fedavg", prepared, one_round, [(2,)], Settings())
    expected = products(fedavg.server.shared)
    got = merged_of(ours.server.kept) if name == "flora" else products(ours.server.shared)
    assert_close(got, expected, products(first.server.shared), bound=1e-4)
    if name == "hetlora":
        assert_close(ours.server.shared, fedavg.server.shared, first.server.shared, bound=1e-5)


def test_flexlora_shares_out_the_best_pair_of_every_rank():
    shared, ranks, weights = random_pairs(0, 4), (1, 4, 2), (0.2, 0.3, 0.5)
    trained = [random_pairs(seed, rank) for seed, rank in enumerate(ranks, 1)]
    after, _ = server_step("flexlora", shared, trained, ranks, weights)
    mean = weighted([products(own) for own in trained], weights)
    for rank in (1, 2, 4):
        cut = products(columns(after, rank))
        for name, dense in mean.items():
            u, s, v = np.linalg.svd(dense, full_matrices=False)
            best = u[..., :rank] * s[:, None, :rank] @ v[:, :rank]
            np.testing.assert_allclose(cut[name], best, rtol=1e-3, atol=1e-4)
    for name, (a, b) in over_pairs(lambda pair: pair, after).items():
        np.testing.assert_allclose(a.mT @ a, np.broadcast_to(np.eye(4), (2, 4, 4)), atol=1e-5)
        s = np.linalg.svd(mean[name], compute_uv=False)[:, :4]
        np.testing.assert_allclose(np.linalg.norm(b, axis=-1), s, rtol=1e-4)


def test_flexlora_pads_where_a_matrix_has_fewer_ranks_than_its_lora():
    shared, trained = random_pairs(0, 7), [random_pairs(1, 7)]
    after, _ = server_step("flexlora", shared, trained, (7,), (1.0,))
    assert tree_map(np.shape, after) == tree_map(np.shape, shared)
    for name, product in products(after).items():
        np.testing.assert_allclose(product, products(trained[0])[name], rtol=1e-3, atol=1e-4)


def test_flexlora_over_two_rounds(prepared, one_round, model, params, batches, examples):
    cohorts = [(0, 1), (1, 2)]
    _, first, states, _ = run("flexlora", prepared, one_round, cohorts, UNEQUAL)
    shared = first.server.shared
    for cohort, state in zip(cohorts, states, strict=True):
        weights = examples[list(cohort)] / examples[list(cohort)].sum()
        trained = [train_by_hand(model, params, shared, batches, i, RANKS[i % 2]) for i in cohort]
        best = {}
        for name, dense in weighted([products(own) for own in trained], weights).items():
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
    """The gradient of `norm_product`: ||B|| A / ||A|| and ||A|| B / ||B||, zero where a norm is."""

    def of_pair(pair):
        a, b = (np.array(factor) for factor in pair)
        a[:, :, :rank], b[:, :rank] = 0, 0
        norms = [np.linalg.norm(factor, axis=(1, 2), keepdims=True) for factor in (a, b)]
        safe = [np.where(norm == 0, 1, norm) for norm in norms]
        return norms[1] * a / safe[0], norms[0] * b / safe[1]

    return as_tree(over_pairs(of_pair, tree))


def hetlora_client(model, params, start, data, rank, decay, strength):
    """(pairs, of the rank that is left; that rank)."""
    fewer = max(1, int(decay * rank))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1))
    pairs = start = columns(start, rank)
    opt_state = optimizer.init(pairs)
    for tokens, mask in zip(*data, strict=True):
        g = gradient(of_rank(model, rank), params, pairs, tokens, mask)
        g = tree_map(lambda g, penalty: g + strength * penalty, g, tail_gradient(pairs, fewer))
        updates, opt_state = optimizer.update(g, opt_state, pairs)
        pairs = optax.apply_updates(pairs, updates)
    left = fewer if norm_product(pairs, fewer) < norm_product(start, fewer) else rank
    return columns(pairs, left), left


@pytest.mark.parametrize("strength", [0.5, 20.0])
def test_hetlora_over_three_rounds(strength, prepared, one_round, model, params, batches):
    """A strong penalty prunes, and a weak one, which nevertheless shows, does not."""
    settings = Settings(ClientSettings(ranks=(2, 2, 1), rank_decay=0.5, rank_lambda=strength))
    cohorts, ranks = [(0, 1), (1, 2), (0, 1)], [2, 2, 1, 2]
    _, first, states, _ = run("hetlora", prepared, one_round, cohorts, settings)
    shared, seen = first.server.shared, []
    for cohort, state in zip(cohorts, states, strict=True):
        trained = []
        for i in cohort:
            own, ranks[i] = hetlora_client(
                model, params, shared, [leaf[i] for leaf in batches], ranks[i], 0.5, strength
            )
            trained.append(own)
        norms = [np.sqrt(sum((p**2).sum() for p in products(own).values())) for own in trained]
        mean = weighted([padded(own, 2) for own in trained], np.array(norms) / sum(norms))
        if max(ranks[i] for i in cohort) == 1:  # nobody's second rank: it stays
            kept = tree_map(np.subtract, shared, padded(columns(shared, 1), 2))
            mean = tree_map(np.add, mean, kept)
        assert_close(state.server.shared, mean, first.server.shared, bound=1e-3)
        shared = state.server.shared
        assert state.clients.kept["rank"].tolist() == ranks
        seen.append(list(ranks))
    assert seen[0] == [2, 2, 1, 2]  # B starts at zero, and so does the product of norms
    assert (seen[-1] != seen[0]) == (strength > 1)


@pytest.mark.parametrize(("rank", "decay", "left"), [(4, 0.99, 3), (4, 0.5, 2), (3, 0.5, 1), (1, 0.5, 1), (4, 1.0, 4)])
def test_hetlora_prunes_to_the_decayed_rank(rank, decay, left):
    """Where the last ranks have shrunk; otherwise it prunes nothing."""
    settings = Settings(ClientSettings(rank_decay=decay))
    shared = padded(columns(random_pairs(0, 4), rank), 4)
    client = ClientState({}, {}, {"rank": np.int32(rank)}, {})
    received = Received({"shared": shared}, {}, client, 0, 1e-2, 1, settings)
    for factor, expected in ((0.9, left), (1.1, rank)):
        trained = {"shared": tree_map(lambda leaf, factor=factor: factor * leaf, shared), "personal": {}}
        upload, _, kept = METHODS["hetlora"].client.finish(received, trained)
        assert kept["rank"] == upload["rank"] == expected
        change = tree_map(lambda leaf, factor=factor: (factor - 1) * leaf, shared)
        sent = padded(columns(change, expected), 4)
        tree_map(partial(np.testing.assert_allclose, atol=1e-6), upload["delta"], sent)


def test_hetlora_weighs_clients_by_the_norms_of_their_products():
    shared, ranks = random_pairs(0, 4), (1, 3, 2)
    trained = [random_pairs(seed, rank) for seed, rank in enumerate(ranks, 1)]
    trained[0] = tree_map(lambda leaf: 2 * leaf, trained[0])
    after, _ = server_step("hetlora", shared, trained, ranks, (0.2, 0.3, 0.5))
    norms = np.array([np.sqrt(sum((p**2).sum() for p in products(own).values())) for own in trained])
    expected = weighted([padded(own, 4) for own in trained], norms / norms.sum())
    last = tree_map(np.subtract, shared, padded(columns(shared, 3), 4))  # nobody's fourth rank
    tree_map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), after, tree_map(np.add, expected, last))


def test_hetlora_stays_finite_where_no_client_has_moved():
    shared = as_tree(over_pairs(lambda pair: (pair[0], 0 * pair[1]), random_pairs(0, 2)))
    after, _ = server_step("hetlora", shared, [shared, shared], (2, 2), (0.5, 0.5))
    tree_map(partial(np.testing.assert_allclose, rtol=1e-6), after, shared)
