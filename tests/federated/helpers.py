"""What several tests of rounds and methods use: sizes of their federation, and training written out by hand."""

from functools import partial

import jax
import numpy as np
import optax

from flex_jax.models.objective import response_loss

N, STEPS, B, S = 4, 3, 2, 10  # clients, steps of a round, rows of a batch, tokens of a row
LEARNING_RATE = 1e-2
CONSTANT_RATE = {"learning_rate": LEARNING_RATE, "final_learning_rate": LEARNING_RATE}  # the same in every round
tree_map = jax.tree.map


def of_client(tree, client):
    """One client's part of a tree with a leading axis C."""
    return tree_map(lambda leaf: leaf[client], tree)


def stack(trees):
    """The inverse of `of_client`: trees of single clients with a leading axis C."""
    return tree_map(lambda *leaves: np.stack(leaves), *trees)


def shares(examples, cohort):
    """The weights of a cohort's clients."""
    return examples[list(cohort)] / examples[list(cohort)].sum()


def mean(trees, weights):
    """The weighted sum of trees."""
    return tree_map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *trees)


def assert_equal(ours, expected):
    """In structure and in every bit."""
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    tree_map(np.testing.assert_array_equal, ours, expected)


def assert_close(ours, expected, start, bound=2e-4):
    """Relative to the distance moved since `start`."""
    difference = optax.tree.norm(tree_map(np.subtract, ours, expected))
    moved = optax.tree.norm(tree_map(np.subtract, expected, start))
    assert moved > 1e-3 and difference <= bound * moved, (difference, moved)


@partial(jax.jit, static_argnums=0)
def loss_of(model, params, adapters, tokens, mask):
    total, count = response_loss(model, {"params": params, "adapters": adapters}, tokens, mask)
    return total / count


@partial(jax.jit, static_argnums=0)
def gradient(model, params, adapters, tokens, mask):
    return jax.grad(loss_of, argnums=2)(model, params, adapters, tokens, mask)


def adamw():
    """The optimiser of a client, as `make_round` has it by default in these tests."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, weight_decay=0.1))


def train(tree, gradient, data, correct=lambda tree: tree):
    """Steps of one tree from fresh moments, as a Python loop.

    Args:
        tree: where it starts.
        gradient: (tree, tokens, mask) -> tree.
        data: (tokens, mask) of each step.
        correct: what happens to the tree after each of AdamW's steps.
    """
    optimizer = adamw()
    state = optimizer.init(tree)
    for tokens, mask in data:
        updates, state = optimizer.update(gradient(tree, tokens, mask), state, tree)
        tree = correct(optax.apply_updates(tree, updates))
    return tree


def plain_client(model, params, adapters, data, correct=lambda tree: tree):
    """A client's round as `train` makes it. `data` is its `Batch` of all steps."""
    return train(adapters, partial(gradient, model, params), zip(*data, strict=True), correct)
