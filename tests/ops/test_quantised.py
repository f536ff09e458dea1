"""Quantised matrices, and the frozen experts on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flex_jax.ops.experts import ExpertWeights, dense_experts, frozen_experts
from flex_jax.ops.quantised import Quantised, dequantise, group_size, quantise

T, D, F, E, K = 150, 128, 24, 5, 2


@pytest.mark.parametrize(("inputs", "group"), [(2048, 64), (1408, 64), (96, 48), (10, 10), (66, 66 // 3), (130, 26)])
def test_groups_divide_the_inputs(inputs, group):
    assert group_size(inputs) == group


def test_an_odd_number_of_inputs_is_refused():
    with pytest.raises(ValueError, match="9 inputs"):
        group_size(9)


@pytest.mark.parametrize(("kind", "largest"), [("int8", 127), ("int4", 7)])
def test_integers_times_their_scale_come_back_exactly(kind, largest):
    """Every integer of the format in both halves of a group, and a different scale for each group and output."""
    integers = np.random.default_rng(0).integers(-largest, largest + 1, (3, D, F))
    integers[:, ::8] = largest  # every group contains the largest
    scale = np.array([0.5, 4.0]).repeat(64)[:, None] * 2.0 ** (np.arange(F) % 3)
    matrix = jnp.asarray(integers * scale * largest / (largest + 0.5), jnp.float32)
    stored = quantise(matrix, kind, jnp.float32)
    assert stored.shape == (3, D, F)
    assert sum(leaf.nbytes for leaf in stored) == 3 * F * (D * {"int8": 1, "int4": 0.5}[kind] + 4 * D / 64)
    np.testing.assert_allclose(dequantise(stored), matrix, rtol=0.08 if kind == "int4" else 0.005)


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.0065), ("int4", 0.097)])
def test_the_error_on_normal_weights_is_that_of_the_format(kind, bound):
    matrix = jax.random.normal(jax.random.PRNGKey(0), (512, 256))
    error = jnp.linalg.norm(dequantise(quantise(matrix, kind, jnp.float32)) - matrix) / jnp.linalg.norm(matrix)
    assert bound / 2 < error < bound


def test_indexing_layers_and_experts_is_that_of_the_plain_matrix():
    stored = quantise(jax.random.normal(jax.random.PRNGKey(0), (2, E, D, F)), "int4", jnp.float32)
    part = jax.tree.map(lambda leaf: leaf[1, 3], stored)
    assert isinstance(part, Quantised)
    np.testing.assert_array_equal(dequantise(part), dequantise(stored)[1, 3])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_frozen_experts_on_integers_equal_dense_ones_on_their_values(kind):
    """Output and gradients, with clients by vmap and rematerialisation, as in training."""
    keys = jax.random.split(jax.random.PRNGKey(0), 5)
    matrices = (jax.random.normal(keys[0], (E, D, 2 * F)) * 0.1, jax.random.normal(keys[1], (E, F, D)) * 0.2)
    stored = ExpertWeights(*(quantise(matrix[None], kind, jnp.float32) for matrix in matrices))
    plain = ExpertWeights(*(matrix[None] for matrix in stored.dequantised()))
    x = jax.random.normal(keys[2], (3, T, D))
    expert_index, routing_weight = jax.random.randint(keys[3], (3, T, K), 0, E), jax.random.uniform(keys[4], (3, T, K))

    def gradients(operator, weights):
        def loss(x, expert_index, routing_weight):
            return jnp.sin(jax.checkpoint(operator)(x, weights, expert_index, routing_weight)).sum()

        return jax.jit(jax.vmap(jax.value_and_grad(loss, argnums=(0, 2))))(x, expert_index, routing_weight)

    ours, reference = gradients(frozen_experts, stored), gradients(dense_experts, plain)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
