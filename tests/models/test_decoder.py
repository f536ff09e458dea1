"""The decoder: adapters, gate, padding, cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flex_jax.federated.ownership import merge
from flex_jax.grafting.surgery import fill_slots
from flex_jax.models.adapters import AdapterConfig, init_attention_lora
from flex_jax.models.config import LoraConfig, SlotConfig
from flex_jax.models.decoder import Decoder, init_cache
from flex_jax.ops.experts import ExpertOps, dense_experts


def logits(model, params, tokens, adapters=None, grafts=None, **keywords):
    variables = {"params": params, "adapters": adapters or {}, "grafts": grafts or {}}
    return model.apply(variables, tokens, **keywords).logits


def slots(params, slot):
    expert_index = jnp.array([[0, 3], [5, 1], [2, 4]])[:, : slot.num_experts]
    return fill_slots(params, expert_index, slot, jax.random.PRNGKey(3))


def test_no_adapters_and_fresh_lora_are_the_pretrained_model_bit_for_bit(model, model_config, params, tokens):
    pretrained = model.apply({"params": params}, tokens).logits
    lora = init_attention_lora(jax.random.PRNGKey(0), model_config, model.adapters.lora)
    np.testing.assert_array_equal(pretrained, logits(model, params, tokens))
    np.testing.assert_array_equal(pretrained, logits(model, params, tokens, lora))


def test_sparse_experts_equal_dense_ones_in_the_whole_model(model, params, tokens):
    dense = Decoder(model.config, experts=ExpertOps(dense_experts))
    np.testing.assert_allclose(logits(model, params, tokens), logits(dense, params, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", ["full", "lora"])
def test_a_closed_gate_is_the_pretrained_model_bit_for_bit(model_config, params, tokens, training):
    slot = SlotConfig(num_experts=2, training=training, lora=LoraConfig(2, 4.0), gate_init="closed")
    model = Decoder(model_config, AdapterConfig(LoraConfig(2, 4.0), slot))
    adapters, grafts = slots(params, slot)
    adapters["layers"]["moe"]["slot"]["gate_bias"] -= 1e4
    pretrained = logits(model, params, tokens)
    np.testing.assert_array_equal(pretrained, logits(model, params, tokens, adapters, grafts))
    adapters["layers"]["moe"]["slot"]["gate_bias"] += 1e4
    assert np.abs(pretrained - logits(model, params, tokens, adapters, grafts)).max() > 1e-4


@pytest.mark.parametrize("num_experts", [1, 2])
@pytest.mark.parametrize("gate", ["sigmoid", "none", "routing"])
def test_the_slot_adds_gated_copies_of_the_grafted_experts(model_config, params, num_experts, gate):
    """Computes one MoE layer by hand.

    sigmoid: sum_j sigmoid(g_j x) P_j(x), where g_j is the router's column. none: sum_j P_j(x). routing:
    sum_j w_j(x) (P_j(x) - E_j(x)), where w_j is 0 for a token whose experts do not include E_j.
    """
    from flex_jax.models.slot import PersonalSlot
    from flex_jax.ops.experts import ExpertWeights

    slot, tokens = SlotConfig(num_experts=num_experts, gate=gate), 7
    adapters, grafts = slots(params, slot)
    personal, grafts = (
        jax.tree.map(lambda leaf: leaf[1], tree["layers"]["moe"]["slot"]) for tree in (adapters, grafts)
    )
    personal["down_proj"]["kernel"] *= 1.5  # trained away from the frozen expert
    moe = jax.tree.map(lambda leaf: np.asarray(leaf[1], np.float64), params["layers"]["moe"])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(tokens, model_config.hidden_size)).astype(np.float32)
    weights = ExpertWeights(*(jnp.asarray(moe[name], jnp.float32)[None] for name in ("gate_up", "down")))
    expert_index = np.stack([rng.permutation(model_config.num_experts)[:3] for _ in range(tokens)])
    routing_weight = rng.random((tokens, 3)).astype(np.float32)
    variables = {"adapters": personal, "grafts": grafts}
    ours = PersonalSlot(slot).apply(variables, x, weights, expert_index, routing_weight)
    expected = 0.0
    for e in [5, 1][:num_experts]:
        gate_half, up = np.split(x @ moe["gate_up"][e], 2, axis=-1)
        output = (gate_half / (1 + np.exp(-gate_half)) * up) @ moe["down"][e]
        routed = (routing_weight * (expert_index == e)).sum(-1)
        share = {"sigmoid": 1 / (1 + np.exp(-x @ moe["router"][:, e])), "none": np.ones(tokens), "routing": routed}
        expected = expected + (0.5 if gate == "routing" else 1.5) * share[gate][:, None] * output
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_lora_slot_starts_as_the_full_one_and_stores_no_expert(model_config, params, tokens):
    results, sizes = [], []
    for training in ("full", "lora"):
        slot = SlotConfig(training=training, lora=LoraConfig(2, 4.0))
        adapters, grafts = slots(params, slot)
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(adapters)))
        results.append(logits(Decoder(model_config, AdapterConfig(slot=slot)), params, tokens, adapters, grafts))
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-5)
    assert sizes[1] < sizes[0] / 2


def test_right_padding_changes_no_real_position(model, params, tokens):
    short = logits(model, params, tokens[:, :6])
    padded = tokens.at[:, 6:].set(0)
    mask = (jnp.arange(tokens.shape[1]) < 6).astype(jnp.int32) * jnp.ones_like(tokens)
    np.testing.assert_allclose(short, logits(model, params, padded)[:, :6], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(short, logits(model, params, padded, attention_mask=mask)[:, :6], rtol=1e-5, atol=1e-5)


def test_reading_through_the_cache_equals_reading_at_once(model, params, tokens):
    whole = logits(model, params, tokens)
    cache, pieces = init_cache(model.config, tokens.shape[0], 14, jnp.float32), []
    for start, stop in [(0, 5), (5, 6), (6, 11)]:
        positions = jnp.broadcast_to(jnp.arange(start, stop), (tokens.shape[0], stop - start))
        out = model.apply({"params": params}, tokens[:, start:stop], positions=positions, cache=cache)
        cache = out.cache
        pieces.append(out.logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, rtol=1e-4, atol=1e-4)


def test_dropout_acts_in_training_only(model_config, params, tokens):
    model = Decoder(model_config, AdapterConfig(lora=LoraConfig(2, 4.0, dropout=0.5)))
    lora = init_attention_lora(jax.random.PRNGKey(0), model_config, model.adapters.lora)
    lora = jax.tree.map(lambda leaf: leaf + 0.1, merge(lora))
    first, again, other = (
        logits(model, params, tokens, lora, rngs=None if seed is None else {"dropout": jax.random.PRNGKey(seed)})
        for seed in (1, 1, None)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
