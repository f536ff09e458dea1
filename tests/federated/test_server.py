"""The server's part of a round: how clients are weighted, and that a delta is clipped once, whatever the method."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flex_jax.federated import server as server_module
from flex_jax.federated.aggregation import RULES
from flex_jax.federated.client import exchanged
from flex_jax.federated.method import Settings, Upload
from flex_jax.federated.server import aggregate, client_weights
from flex_jax.methods import METHODS
from flex_jax.models.lora import map_pairs
from tests.federated.helpers import N, assert_equal, tree_map

CLIP_NORM = 0.1


@pytest.fixture(scope="module")
def shapes(abstract):
    """spec -> shapes of (server state, an upload, the uploads of a cohort)."""

    def make(spec):
        _, state = abstract(spec)
        client = tree_map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state.clients)
        upload, _ = exchanged(spec, state.server, client)
        return state.server, upload, tree_map(lambda leaf: jax.ShapeDtypeStruct((N, *leaf.shape), leaf.dtype), upload)

    return make


def random(tree):
    """Random numbers for shapes, in norm much larger than CLIP_NORM."""
    rng = np.random.default_rng(0)
    return tree_map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), tree)


def norms(stacked):
    return jax.vmap(optax.tree.norm)(stacked)


@pytest.mark.parametrize("name", METHODS)
def test_deltas_are_clipped_once_for_every_method(name, spec_of, shapes, examples, monkeypatch):
    """Whatever its update does with them: it gets them clipped, and its mean does not clip anything again."""
    spec = spec_of(name, settings=Settings(clip_norm=CLIP_NORM))
    server, upload, uploads = shapes(spec)
    clipped, seen = [], []

    def spy(stacked, clip_norm):
        clipped.append((stacked, clip_norm))
        return clip(stacked, clip_norm)

    def update(state, context):
        seen.append(context)
        return spec.method.server.update(state, context)

    clip = server_module.clip
    monkeypatch.setattr(server_module, "clip", spy)
    rule = spec.method.server._replace(update=update)
    watched = spec._replace(method=spec.method._replace(server=rule))
    jax.eval_shape(partial(aggregate, watched, N), upload, server, uploads, examples)
    shared = bool(jax.tree.leaves(server.shared))
    assert [norm for _, norm in clipped] == [CLIP_NORM] * shared
    assert all(jax.tree.structure(stacked) == jax.tree.structure(uploads.delta) for stacked, _ in clipped)
    (context,) = seen
    assert jax.tree.structure(context.uploads) == jax.tree.structure(uploads) and context.num_clients == N


def test_only_deltas_are_clipped(spec_of, shapes, examples):
    """Each client's as a whole. SCAFFOLD's controls, which are uploaded next to them, are averaged as they are."""
    spec = spec_of("scaffold", settings=Settings(clip_norm=CLIP_NORM))
    server, upload, uploads = shapes(spec)
    server, uploads = random(server), random(uploads)
    after = jax.jit(partial(aggregate, spec, N))(upload, server, uploads, examples)
    factor = CLIP_NORM / np.asarray(norms(uploads.delta))
    assert (factor < 0.1).all()
    weights = examples / examples.sum()
    moved = tree_map(lambda leaf: np.tensordot(weights * factor, leaf, 1), uploads.delta)
    control = tree_map(lambda c, leaf: c + leaf.mean(0), server.extra["control"], uploads.extra["control"])
    tree_map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), after.shared, optax.tree.add(server.shared, moved)
    )
    tree_map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), after.extra["control"], control)


@pytest.mark.parametrize("aggregation", RULES)
def test_a_method_that_shares_nothing_has_nothing_to_clip_or_combine(aggregation, spec_of, shapes, examples):
    spec = spec_of("local", settings=Settings(aggregation=aggregation, clip_norm=1.0))
    server, upload, uploads = shapes(spec)
    assert_equal(aggregate(spec, N, upload, server, uploads, examples), server)
    nested = Upload({"layers": {}})
    assert_equal(
        aggregate(spec, N, nested, server._replace(shared={"layers": {}}), nested, examples).shared, {"layers": {}}
    )


def test_weights_sum_to_one():
    counts = jnp.array([1.0, 2.0, 5.0])
    np.testing.assert_allclose(client_weights(counts, "examples"), [0.125, 0.25, 0.625])
    np.testing.assert_allclose(client_weights(counts, "uniform"), [1 / 3] * 3, rtol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_a_client_that_is_left_out_has_no_effect(name, spec_of, shapes, examples):
    """The server's state is that of a cohort without it, whatever it uploads."""
    spec = spec_of(name)
    server, upload, uploads = shapes(spec)
    server = tree_map(np.abs, random(server))  # second moments are not negative
    uploads = tree_map(lambda leaf: np.ones_like(leaf) if leaf.dtype == np.int32 else leaf, random(uploads))
    left_out, others = 2, np.array([0, 1, 3])
    counted = np.where(np.arange(N) == left_out, 0, examples)

    def spoil(leaf):
        return np.where((np.arange(N) == left_out).reshape(-1, *[1] * (leaf.ndim - 1)), np.nan, leaf).astype(leaf.dtype)

    combine = jax.jit(partial(aggregate, spec, N))
    spoiled = tree_map(lambda leaf: spoil(leaf) if np.issubdtype(leaf.dtype, np.floating) else leaf, uploads)
    after = combine(upload, server, spoiled, counted)
    expected = combine(
        upload, server, tree_map(lambda leaf: leaf[np.array(others)], uploads), counted[np.array(others)]
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    if name == "flexlora":  # the factors of an SVD have either sign
        after, expected = (
            map_pairs(lambda pair: pair["lora_a"] @ pair["lora_b"], state.shared) for state in (after, expected)
        )
    tree_map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), after, expected)
