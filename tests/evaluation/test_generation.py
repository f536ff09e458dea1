"""Greedy generation for all clients at once against a loop without a cache."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flex_jax.data.batches import Batch
from flex_jax.evaluation.generation import greedy, pad_prompts
from flex_jax.evaluation.loss import evaluation_loss
from flex_jax.federated.placement import merge
from flex_jax.federated.start import start
from flex_jax.methods import METHODS

NEW = 6


@pytest.fixture(scope="module")
def federation(model, model_config, params):
    """Three FLEx clients whose adapters have moved away from their start."""
    chosen = np.arange(3 * model_config.layers).reshape(3, -1, 1) % model_config.experts
    placement = METHODS["flex"].placement
    frozen, state = start(
        model_config, params, model.adapters, placement, chosen, clients=3, key=jax.random.PRNGKey(0)
    )
    keys = iter(jax.random.split(jax.random.PRNGKey(1), 100))
    moved = [jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), tree)
             for tree in (state.server.shared, state.clients.personal)]
    return frozen, moved[0], state.clients._replace(personal=moved[1])


@partial(jax.jit, static_argnums=0)
def apply(model, params, adapters, tokens):
    return model.apply({"params": params, "adapters": adapters}, tokens).logits


def logits_of(model, federation, client, ids):
    """Logits [len(ids), V] of one client, without a cache (the sequence is padded so that one compilation serves)."""
    frozen, shared, clients = federation
    own = jax.tree.map(lambda leaf: leaf[client], clients.personal)
    padded = jnp.array([[*ids, *[0] * (16 - len(ids))]], jnp.int32)
    return apply(model, frozen.params, merge(shared, own), padded)[0, : len(ids)]


def naive(model, federation, client, prompt, end):
    ids = list(prompt)
    for _ in range(NEW):
        ids.append(int(logits_of(model, federation, client, ids)[-1].argmax()))
        if ids[-1] == end:
            break
    new = ids[len(prompt):]
    return new + [end] * (NEW - len(new))


def test_every_row_equals_the_loop_of_its_own_client(model, federation):
    rng = np.random.default_rng(0)
    prompts = [[rng.integers(0, 60, size).tolist() for size in sizes] for sizes in ([3, 9], [5, 1], [7, 4])]
    tokens, lengths = pad_prompts(prompts, 0)
    free = naive(model, federation, 1, prompts[1][0], -1)
    end = free[2]  # a token that this row says by itself: it must stop there
    new = greedy(model, *federation, tokens, lengths, max_new_tokens=NEW, end=end)
    expected = [[naive(model, federation, c, prompt, end) for prompt in client] for c, client in enumerate(prompts)]
    assert np.asarray(new).tolist() == expected


def test_evaluation_loss_is_the_mean_over_response_tokens(model, federation):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 60, (3, 4, 8)).astype(np.int32)
    mask = (rng.random((3, 4, 8)) < 0.5).astype(np.float32)
    mask[..., 0] = 0
    halves = [Batch(tokens[:, rows], mask[:, rows]) for rows in (slice(0, 2), slice(2, 4))]
    losses = evaluation_loss(model, *federation, halves)
    for c in range(3):
        terms = [
            -jax.nn.log_softmax(logits_of(model, federation, c, tokens[c, b]))[t - 1, tokens[c, b, t]]
            for b in range(4) for t in range(8) if mask[c, b, t]
        ]
        np.testing.assert_allclose(losses[c], np.mean(terms), rtol=1e-5)
