"""The adapters of a projection: LoRA, and another kind that a method brings."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flex_jax.models.adapters import LORA, AdapterConfig, ProjectionAdapter, init_attention_lora
from flex_jax.models.attention import Positions
from flex_jax.models.config import LoraConfig
from flex_jax.models.decoder import Decoder, Layer
from flex_jax.models.export.transformers import merge_adapters
from flex_jax.models.linear import Projection
from flex_jax.models.norm import RMSNorm
from flex_jax.models.rotary import rotary
from flex_jax.ops.experts import ExpertOps

STEPS, RATE = 3, 0.5


def scale_and_shift(leaves, lora, x, y, dropout):
    """IA3 (arXiv 2205.05638) where there is a `scale`, BitFit (arXiv 2106.10199) where there is a `shift`."""
    return y * leaves.get("scale", 1.0) + leaves.get("shift", 0.0)


def add_difference(leaves, lora, x, y, dropout):
    return y + x @ leaves["difference"]


def merge_difference(leaves, lora, kernel):
    return kernel + leaves["difference"]


SCALE_AND_SHIFT = AdapterConfig(projection=ProjectionAdapter(scale_and_shift))
DIFFERENCE = AdapterConfig(projection=ProjectionAdapter(add_difference, merge_difference))


def cross_entropy(logits, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def logits_by_hand(config, params, adapters, tokens):
    """Runs the decoder layer by layer, and changes the outputs of its frozen projections from outside."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    positions = Positions(index, rotary(config.rope, config.head_dim, index, index.max(1) + 1), None)
    x = params["embedding"][tokens]
    for number in range(config.num_layers):
        layer, leaves = jax.tree.map(lambda leaf, n=number: leaf[n], (params["layers"], adapters["layers"]))

        def change(call, arguments, keywords, context, leaves=leaves["attention"]):
            y = call(*arguments, **keywords)
            if context.module.name == "v_proj":
                return y * leaves["v_proj"]["scale"]
            return y + leaves["o_proj"]["shift"] if context.module.name == "o_proj" else y

        with nn.intercept_methods(change):
            frozen = Layer(config, AdapterConfig(), ExpertOps(), None, False)
            x, _ = frozen.apply({"params": layer}, x, (None, number), None, positions)
    return RMSNorm(config.rms_norm_eps).apply({"params": params["norm"]}, x) @ params["head"].T


def test_another_adapter_is_trained_under_vmap_and_scan(model_config, params):
    """Two clients by vmap, steps by scan, layers by scan: as by hand, one client and layer after another."""
    c, model = model_config, Decoder(model_config, SCALE_AND_SHIFT)
    tokens = jax.random.randint(jax.random.PRNGKey(0), (2, 4, 11), 0, c.vocab_size)
    scale = jnp.ones((c.num_layers, c.num_kv_heads * c.head_dim))
    shift = jnp.zeros((c.num_layers, c.hidden_size))
    start = {"layers": {"attention": {"v_proj": {"scale": scale}, "o_proj": {"shift": shift}}}}

    def ours(adapters, tokens):
        return model.apply({"params": params, "adapters": adapters}, tokens).logits

    def train(adapters, tokens):
        def step(adapters, _):
            gradients = jax.grad(lambda adapters: cross_entropy(ours(adapters, tokens), tokens))(adapters)
            return jax.tree.map(lambda leaf, gradient: leaf - RATE * gradient, adapters, gradients), None

        return jax.lax.scan(step, adapters, None, length=STEPS)[0]

    trained = jax.jit(jax.vmap(train, in_axes=(None, 0)))(start, tokens)
    logits = jax.vmap(ours)(trained, tokens)
    by_hand = jax.jit(lambda adapters, tokens: logits_by_hand(c, params, adapters, tokens))
    gradient = jax.jit(
        jax.grad(lambda adapters, tokens: cross_entropy(logits_by_hand(c, params, adapters, tokens), tokens))
    )
    for client in range(2):
        expected = start
        for _ in range(STEPS):
            gradients = gradient(expected, tokens[client])
            expected = jax.tree.map(lambda leaf, gradient: leaf - RATE * gradient, expected, gradients)
        own = jax.tree.map(lambda leaf, client=client: leaf[client], trained)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), own, expected)
        assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(*map(jax.tree.leaves, (own, start)), strict=True))
        np.testing.assert_allclose(logits[client], by_hand(own, tokens[client]), rtol=1e-4, atol=1e-4)
    assert np.abs(logits[0] - by_hand(start, tokens[0])).max() > 1e-2


def test_every_projection_of_latent_attention_reads_its_leaves(latent_config):
    model, tokens = Decoder(latent_config, SCALE_AND_SHIFT), jnp.arange(8)[None]
    params = Decoder(latent_config).init(jax.random.PRNGKey(0), tokens)["params"]
    pretrained = model.apply({"params": params}, tokens).logits
    sizes = {name: outputs for name, (_, outputs) in latent_config.lora_projections().items()} | {"o_proj": 16}
    assert len(sizes) == 5
    for stack, num_layers in latent_config.layer_stacks().items():
        for name, size in sizes.items():
            shift = jnp.broadcast_to(jnp.arange(1.0, size + 1), (num_layers, size))
            adapters = {stack: {"attention": {name: {"shift": shift}}}}
            changed = model.apply({"params": params, "adapters": adapters}, tokens).logits
            assert np.abs(changed - pretrained).max() > 1e-4, (stack, name)


def test_lora_is_the_frozen_map_plus_the_scaled_pair_bit_for_bit():
    keys = jax.random.split(jax.random.PRNGKey(0), 5)
    x, kernel, bias, a, b = map(jax.random.normal, keys, ((7, 6), (6, 5), (5,), (6, 2), (2, 5)))
    config = AdapterConfig(LoraConfig(rank=2, alpha=3.0))
    variables = {"params": {"kernel": kernel, "bias": bias}, "adapters": {"lora_a": a, "lora_b": b}}
    ours = Projection(5, True, config).apply(variables, x)
    np.testing.assert_array_equal(ours, (x @ kernel + bias) + (x @ a) @ b * 1.5)


def differences(config):
    """Another adapter on the query and output projections."""
    keys = jax.random.split(jax.random.PRNGKey(0))
    shape = (config.num_layers, config.hidden_size, config.hidden_size)
    leaves = [{"difference": 0.1 * jax.random.normal(key, shape)} for key in keys]
    return {"layers": {"attention": dict(zip(("q_proj", "o_proj"), leaves, strict=True))}}


def test_another_adapter_is_merged_by_its_function(model_config, params, tokens):
    model, adapters = Decoder(model_config, DIFFERENCE), differences(model_config)
    adapted = model.apply({"params": params, "adapters": adapters}, tokens).logits
    merged = merge_adapters(params, adapters, DIFFERENCE)
    np.testing.assert_allclose(model.apply({"params": merged}, tokens).logits, adapted, rtol=1e-4, atol=1e-4)
    for name in ("q_proj", "o_proj"):
        kernel, expected = (tree["layers"]["attention"][name]["kernel"] for tree in (merged, params))
        np.testing.assert_array_equal(kernel, expected + adapters["layers"]["attention"][name]["difference"])


def test_an_adapter_that_cannot_be_merged_is_refused_by_its_place(model_config, params):
    with pytest.raises(ValueError, match="adapter of layers/attention/q_proj cannot be merged"):
        merge_adapters(
            params, differences(model_config), AdapterConfig(projection=DIFFERENCE.projection._replace(merge=None))
        )
    assert merge_adapters(params, {}, SCALE_AND_SHIFT).keys() == params.keys()


@pytest.mark.parametrize("name", ["v_proj", "o_proj"])
def test_a_merge_that_is_not_what_the_model_applies_is_refused(name, model_config, params):
    """A scale on the output also scales the bias, which v_proj has and o_proj has not."""
    scale = ProjectionAdapter(
        lambda leaves, lora, x, y, dropout: y * leaves["scale"],
        lambda leaves, lora, kernel: kernel * leaves["scale"][:, None, :],
    )
    outputs = params["layers"]["attention"][name]["kernel"].shape[-1]
    leaves = {"scale": jnp.linspace(0.5, 2.0, model_config.num_layers * outputs).reshape(-1, outputs)}
    adapters = {"layers": {"attention": {name: leaves}}}
    if name == "v_proj":
        with pytest.raises(ValueError, match="merge of layers/attention/v_proj does not give the output of apply"):
            merge_adapters(params, adapters, AdapterConfig(projection=scale))
    else:
        merged = merge_adapters(params, adapters, AdapterConfig(projection=scale))["layers"]["attention"][name]
        expected = params["layers"]["attention"][name]["kernel"] * leaves["scale"][:, None, :]
        np.testing.assert_array_equal(merged["kernel"], expected)


def test_models_with_the_same_adapters_are_compiled_once(model_config):
    first, again = (Decoder(model_config, AdapterConfig(projection=ProjectionAdapter(scale_and_shift))) for _ in "ab")
    assert hash(first) == hash(again) and first == again and first != Decoder(model_config, AdapterConfig())
    assert AdapterConfig().projection is LORA


def test_attention_lora_starts_with_a_product_of_zero(model_config):
    tree = init_attention_lora(jax.random.PRNGKey(0), model_config, LoraConfig(rank=2))["layers"]["attention"]
    assert set(tree) == {"q_proj", "k_proj", "v_proj"}
    for name, (inputs, outputs) in model_config.lora_projections().items():
        assert tree[name]["lora_a"].shape == (3, inputs, 2) and tree[name]["lora_b"].shape == (3, 2, outputs)
        assert tree[name]["lora_a"].any() and not tree[name]["lora_b"].any()
