"""The chunked loss against the full logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flex_jax.ops.cross_entropy import token_cross_entropy

B, S, D, V = 2, 7, 16, 100


@pytest.fixture
def arrays():
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    return (
        jax.random.normal(keys[0], (B, S, D)) * 3,
        jax.random.normal(keys[1], (V, D)),
        jax.random.randint(keys[2], (B, S), 0, V).at[0, :2].set(jnp.array([0, V - 1])),
    )


def full(features, head, targets):
    return optax.softmax_cross_entropy_with_integer_labels(jnp.einsum("bsd,vd->bsv", features, head), targets)


@pytest.mark.parametrize("chunk", [1, 33, 50, 100, 8192], ids=lambda chunk: f"chunk{chunk}")
def test_value_and_gradient_equal_the_full_logits(arrays, chunk):
    features, head, targets = arrays
    weight = jnp.arange(B * S, dtype=jnp.float32).reshape(B, S)

    def total(loss, features):
        return (loss(features) * weight).sum()

    ours = jax.value_and_grad(lambda f: total(lambda f: token_cross_entropy(f, head, targets, chunk), f))(features)
    reference = jax.value_and_grad(lambda f: total(lambda f: full(f, head, targets), f))(features)
    for a, b in zip(ours, reference, strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


def test_the_logits_of_a_batch_never_exist(arrays):
    """Neither pass makes an array of positions x vocabulary."""
    features, head, targets = arrays
    gradient = jax.grad(lambda f: token_cross_entropy(f, head, targets, 10).sum())
    text = jax.jit(gradient).lower(features).as_text()
    assert f"tensor<{B}x{S}x{V}xf32>" not in text
    assert f"tensor<{B}x{S}x10xf32>" in text


def test_large_logits_do_not_overflow(arrays):
    features, head, targets = arrays
    assert np.isfinite(token_cross_entropy(features * 1e4, head, targets, 30)).all()
