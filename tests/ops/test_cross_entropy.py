"""Compares the cross-entropy in chunks with that of the full logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flex_jax.ops.cross_entropy import token_cross_entropy

T, D, V = 14, 16, 100


@pytest.fixture
def arrays():
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    return (
        jax.random.normal(keys[0], (T, D)) * 3,
        jax.random.normal(keys[1], (V, D)),
        jax.random.randint(keys[2], (T,), 0, V).at[:2].set(jnp.array([0, V - 1])),
        jax.random.bernoulli(keys[3], 0.5, (T,)).at[:2].set(True),
    )


def full(features, head, targets, loss_mask):
    return optax.softmax_cross_entropy_with_integer_labels(features @ head.T, targets) * loss_mask


def value_and_gradient(loss, features):
    weight = jnp.arange(1.0, 1 + features.shape[-2])
    return jax.value_and_grad(lambda features: (loss(features) * weight).sum())(features)


def assert_close(ours, reference):
    for a, b in zip(ours, reference, strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize("chunk", [1, 3, 7, T, 512], ids=lambda chunk: f"chunk{chunk}")
def test_value_and_gradient_equal_the_full_logits(arrays, chunk):
    features, head, targets, loss_mask = arrays
    ours = value_and_gradient(lambda f: token_cross_entropy(f, head, targets, loss_mask, chunk), features)
    assert_close(ours, value_and_gradient(lambda f: full(f, head, targets, loss_mask), features))
    np.testing.assert_array_equal(ours[1][~loss_mask], 0.0)


def test_the_loss_without_a_gradient_is_the_same(arrays):
    np.testing.assert_allclose(token_cross_entropy(*arrays, 3), full(*arrays), rtol=1e-5)


@pytest.mark.parametrize("empty", [True, False])
def test_an_empty_mask_gives_zero(arrays, empty):
    features, head, targets, _ = arrays
    loss_mask = jnp.zeros(T, bool).at[0].set(not empty)
    loss, gradient = value_and_gradient(lambda f: token_cross_entropy(f, head, targets, loss_mask), features)
    assert (float(loss) == 0.0 and not gradient.any()) == empty


def test_vmap_over_clients_equals_one_client_at_a_time(arrays):
    """Their positions are merged: some clients have many, one has none."""
    _, head, _, _ = arrays
    keys = jax.random.split(jax.random.PRNGKey(1), 3)
    features = jax.random.normal(keys[0], (3, T, D))
    targets = jax.random.randint(keys[1], (3, T), 0, V)
    loss_mask = jax.random.bernoulli(keys[2], 0.4, (3, T)).at[1].set(False)

    def one(loss):
        return jax.vmap(lambda f, t, w: value_and_gradient(lambda f: loss(f, head, t, w), f))

    ours = jax.jit(one(lambda *given: token_cross_entropy(*given, 4)))(features, targets, loss_mask)
    assert_close(ours, one(full)(features, targets, loss_mask))


def test_the_logits_of_a_batch_never_exist(arrays):
    """Neither pass makes an array of positions x vocabulary."""
    features, head, targets, loss_mask = arrays
    gradient = jax.grad(lambda f: token_cross_entropy(f, head, targets, loss_mask, 3).sum())
    text = jax.jit(gradient).lower(features).as_text()
    assert f"tensor<{T}x{V}xf32>" not in text
    assert f"tensor<3x{V}xf32>" in text


def test_large_logits_do_not_overflow(arrays):
    features, *rest = arrays
    assert np.isfinite(token_cross_entropy(features * 1e4, *rest, 5)).all()
