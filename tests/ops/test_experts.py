"""Compares the frozen sparse operator with the dense reference, under every transformation that training uses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flex_jax.ops import grouped
from flex_jax.ops.experts import ExpertWeights, dense_experts, frozen_experts

T, D, F, E, K = 300, 16, 12, 5, 2


@pytest.fixture
def weights():
    keys = jax.random.split(jax.random.PRNGKey(0))
    gate_up, down = jax.random.normal(keys[0], (3, E, D, 2 * F)), jax.random.normal(keys[1], (3, E, F, D))
    return ExpertWeights(gate_up * D**-0.5, down * F**-0.5, layer=1)


def inputs(seed, *leading, skewed=False):
    keys = jax.random.split(jax.random.PRNGKey(seed), 3)
    expert_index = jax.random.randint(keys[1], (*leading, T, K), 0, 1 if skewed else E)
    return jax.random.normal(keys[0], (*leading, T, D)), expert_index, jax.random.uniform(keys[2], (*leading, T, K))


def objective(operator, weights, x, expert_index, routing_weight):
    return jnp.sin(operator(x, weights, expert_index, routing_weight)).sum()


def assert_close(ours, reference, bound=1e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b)


@pytest.mark.parametrize("skewed", [False, True], ids=["spread", "all tokens on one expert"])
def test_forward_equals_dense(weights, skewed):
    x, expert_index, routing_weight = inputs(1, skewed=skewed)
    assert_close(
        frozen_experts(x, weights, expert_index, routing_weight),
        dense_experts(x, weights, expert_index, routing_weight),
    )


def test_fewer_tokens_than_a_block(weights):
    x, expert_index, routing_weight = (leaf[:3] for leaf in inputs(2))
    assert_close(
        frozen_experts(x, weights, expert_index, routing_weight),
        dense_experts(x, weights, expert_index, routing_weight),
    )


@pytest.mark.parametrize("rematerialise", [False, True])
def test_gradients_under_vmap_and_scan_equal_dense(weights, rematerialise):
    """Four clients by vmap and two layers by scan, as in training."""

    def gradients(operator):
        def layers(x, expert_index, routing_weight):
            def layer(x, _):
                return x + operator(jnp.tanh(x), weights, expert_index, routing_weight), None

            body = jax.checkpoint(layer) if rematerialise else layer
            return jnp.sin(jax.lax.scan(body, x, None, length=2)[0]).sum()

        return jax.jit(jax.vmap(jax.grad(layers, argnums=(0, 2))))(*inputs(3, 4))

    assert_close(gradients(frozen_experts), gradients(dense_experts))


def test_clients_may_share_an_argument(weights):
    """An argument without a client axis is the same for all clients."""
    x, _, routing_weight = inputs(4, 3)
    _, expert_index, _ = inputs(5)
    ours = jax.vmap(lambda x, routing_weight: frozen_experts(x, weights, expert_index, routing_weight))(
        x, routing_weight
    )
    reference = jnp.stack([dense_experts(x[c], weights, expert_index, routing_weight[c]) for c in range(3)])
    assert_close(ours, reference)


def test_experts_get_no_gradient(weights):
    x, expert_index, routing_weight = inputs(6)

    def of(stacks):
        return objective(frozen_experts, ExpertWeights(*stacks, weights.layer), x, expert_index, routing_weight)

    assert all(not leaf.any() for leaf in jax.grad(of)(weights[:2]))


def test_vmap_over_expert_weights_is_refused(weights):
    x, expert_index, routing_weight = inputs(7, 2)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), weights)
    with pytest.raises(ValueError, match="one frozen backbone"):
        jax.vmap(frozen_experts)(x, stacked, expert_index, routing_weight)


def test_bfloat16_stays_bfloat16(weights):
    x, expert_index, routing_weight = inputs(8)
    half = weights._replace(gate_up=weights.gate_up.astype(jnp.bfloat16), down=weights.down.astype(jnp.bfloat16))
    out = frozen_experts(x.astype(jnp.bfloat16), half, expert_index, routing_weight)
    assert out.dtype == jnp.bfloat16
    assert_close(out.astype(jnp.float32), dense_experts(x, weights, expert_index, routing_weight), bound=2e-2)


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_experts_of_other_devices_add_nothing(weights, backend, monkeypatch):
    """With experts on several devices, most tokens of a device go elsewhere. On every backend."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(grouped, "_has_triton", lambda: backend == "gpu")
    monkeypatch.setattr(grouped, "grouped_matmul_kernel", partial(grouped.grouped_matmul_kernel, interpret=True))
    x, expert_index, routing_weight = inputs(9)
    away = expert_index < 2
    expert_index, routing_weight = jnp.where(away, E, expert_index), jnp.where(away, 0.0, routing_weight)

    def gradients(operator):
        return jax.value_and_grad(partial(objective, operator, weights), argnums=(0, 2))(
            x, expert_index, routing_weight
        )

    (ours, (dx, d_weight)), (reference, (expected, d_expected)) = map(gradients, (frozen_experts, dense_experts))
    assert_close((ours, dx, d_weight * ~away), (reference, expected, d_expected * ~away))
