"""Reconstruction losses and the choice of experts against plain NumPy loops (float64)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flex_jax.grafting import reconstruction_losses
from flex_jax.grafting.selection import SelectionSettings, at_random, by_reconstruction, by_router, select
from flex_jax.grafting.surgery import fill_slots
from flex_jax.models.config import SlotConfig
from flex_jax.models.decoder import Decoder

C, B, S = 2, 3, 9


@pytest.fixture(scope="module")
def calibration(model_config):
    """Two batches of (tokens [C, B, S], mask [C, B, S]), right-padded; the last row of the second is all padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model_config.vocab_size, (2, C, B, S)).astype(np.int32)
    lengths = rng.integers(2, S + 1, (2, C, B, 1))
    mask = (np.arange(S) < lengths).astype(np.int32)
    mask[1, 1, 2] = 0
    return list(zip(tokens, mask, strict=True))


@pytest.fixture(scope="module")
def layers(model, params, calibration):
    """Per batch what the NumPy reference needs: MoE inputs, outputs, router logits and indices [L, C, B, S, .]."""

    def observe(seen, _):
        return seen.x, seen.routed, seen.router_logits, seen.expert_index

    def inputs(tokens):
        flat = tokens.reshape(C * B, S)
        features = model.clone(probe=observe).apply({"params": params}, flat, method=Decoder.features)
        return [np.asarray(leaf, np.float64).reshape(leaf.shape[0], C, B, S, -1) for leaf in features.probed]

    return [inputs(tokens) for tokens, _ in calibration]


def expert(params, layer, e, x):
    """E_e(x) of a layer in float64."""
    moe = params["layers"]["moe"]
    gate, up = np.split(x @ np.asarray(moe["gate_up"][layer, e], np.float64), 2, axis=-1)
    return (gate / (1 + np.exp(-gate)) * up) @ np.asarray(moe["down"][layer, e], np.float64)


def selected_output(params, layer, selected, x, logits):
    """The layer with only the experts `selected`, and the router's softmax over them."""
    share = np.exp(logits[..., selected] - logits[..., selected].max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    return sum(share[..., j, None] * expert(params, layer, e, x) for j, e in enumerate(selected))


def loop_losses(config, params, calibration, layers, client, selected):
    """Sums the Frobenius norm over sequences by loops, [L, E]. selected[l] are the experts selected so far."""
    losses = np.zeros((config.num_layers, config.num_experts))
    for (_, mask), (xs, routed, logits, _) in zip(calibration, layers, strict=True):
        for layer in range(config.num_layers):
            for e in range(config.num_experts):
                for b in range(B):
                    real = mask[client, b].astype(bool)
                    x, target, scores = (a[layer, client, b][real] for a in (xs, routed, logits))
                    out = selected_output(params, layer, [*selected[layer], e], x, scores)
                    losses[layer, e] += np.sqrt(((out - target) ** 2).sum())
    return losses


@pytest.mark.parametrize("client", range(C))
def test_losses_equal_a_plain_loop(model, model_config, params, calibration, layers, client):
    batches = [(tokens[client], mask[client]) for tokens, mask in calibration]
    ours = reconstruction_losses(model, params, batches)
    expected = loop_losses(model_config, params, calibration, layers, client, [[]] * model_config.num_layers)
    assert ours.shape == (model_config.num_layers, model_config.num_experts)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_the_routed_output_is_that_of_the_layer(model_config, params, layers):
    """Computes M(X) by hand: a mistake in it would be in both losses."""
    xs, routed, logits, _ = layers[0]
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for layer in range(model_config.num_layers):
        order = np.argsort(-share[layer], axis=-1)[..., : model_config.num_experts_per_tok]
        expected = np.zeros_like(routed[layer])
        for e in range(model_config.num_experts):
            weight = np.where((order == e).any(-1), share[layer][..., e], 0.0)
            expected += weight[..., None] * expert(params, layer, e, xs[layer])
        np.testing.assert_allclose(routed[layer], expected, rtol=1e-4, atol=1e-4)


def test_one_and_three_selected_experts_are_those_of_the_loops(model, model_config, params, calibration, layers):
    chosen = by_reconstruction(model, params, lambda: iter(calibration), 3)
    for client in range(C):
        selected = [[] for _ in range(model_config.num_layers)]
        for _ in range(3):
            losses = loop_losses(model_config, params, calibration, layers, client, selected)
            for layer in range(model_config.num_layers):
                losses[layer, selected[layer]] = np.inf
                selected[layer].append(int(losses[layer].argmin()))
        assert chosen[client].tolist() == selected
    one = by_reconstruction(model, params, lambda: iter(calibration), 1)
    np.testing.assert_array_equal(one, chosen[..., :1])


def test_router_choice_is_the_most_routed(model, model_config, params, calibration, layers):
    chosen = by_router(model, params, lambda: iter(calibration), 2)
    for client in range(C):
        for layer in range(model_config.num_layers):
            counts = np.zeros(model_config.num_experts)
            for (_, mask), (*_, index) in zip(calibration, layers, strict=True):
                real = index[layer, client][mask[client].astype(bool)].astype(int)
                counts += np.bincount(real.ravel(), minlength=model_config.num_experts)
            best = counts[chosen[client, layer]]
            assert best.tolist() == sorted(counts)[::-1][:2]


def test_a_random_selection_repeats_by_key_and_selects_no_expert_twice(model, params):
    first, again, other = (at_random(jax.random.PRNGKey(seed), (5, 4, 6), 3) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert all(len(set(experts)) == 3 for experts in first.reshape(-1, 3).tolist())
    chosen = select(model, params, None, SelectionSettings("random", 3), num_clients=5, key=jax.random.PRNGKey(0))
    assert chosen.shape == (5, model.config.num_layers, 3)


@pytest.mark.parametrize("gate_init", ["router", "closed"])
def test_surgery_copies_the_experts_and_their_gates(model_config, params, gate_init):
    chosen = np.array([[4, 0], [2, 5], [1, 3]], np.int32)
    slot = SlotConfig(num_experts=2, gate_init=gate_init)
    adapters, grafts = fill_slots(params, jnp.asarray(chosen), slot, jax.random.PRNGKey(0))
    tree, moe = adapters["layers"]["moe"]["slot"], params["layers"]["moe"]
    np.testing.assert_array_equal(grafts["layers"]["moe"]["slot"]["expert_index"], chosen)
    for layer in range(model_config.num_layers):
        for j, e in enumerate(chosen[layer]):
            gate, up = jnp.split(moe["gate_up"][layer, e], 2, axis=-1)
            np.testing.assert_array_equal(tree["gate_proj"]["kernel"][layer, j], gate)
            np.testing.assert_array_equal(tree["up_proj"]["kernel"][layer, j], up)
            np.testing.assert_array_equal(tree["down_proj"]["kernel"][layer, j], moe["down"][layer, e])
            if gate_init == "router":
                np.testing.assert_array_equal(tree["gate"][layer, :, j], moe["router"][layer, :, e])
    if gate_init == "closed":
        assert not tree["gate"].any() and (jax.nn.sigmoid(tree["gate_bias"]) < 0.02).all()
