"""PEFT adapters are written and read, and adapters are merged into weights, without torch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flex_jax.errors import InputError
from flex_jax.grafting.surgery import fill_slots
from flex_jax.models.adapters import AdapterConfig, init_attention_lora
from flex_jax.models.checkpoint import save_pretrained
from flex_jax.models.config import LoraConfig, SlotConfig
from flex_jax.models.decoder import Decoder
from flex_jax.models.export.peft import CONFIG, WEIGHTS, has_adapter, load_adapter, save_adapter
from flex_jax.models.export.transformers import full_slot, merge_adapters, save_transformers

LORA = LoraConfig(rank=2, alpha=3.0, dropout=0.1)


def trained_lora(config, lora=LORA):
    """Attention LoRA in which no factor is zero."""
    tree = init_attention_lora(jax.random.PRNGKey(3), config, lora)
    noise = np.random.default_rng(4)
    return jax.tree.map(lambda leaf: leaf + noise.standard_normal(leaf.shape).astype(np.float32), tree)


@pytest.mark.parametrize("kind", ["model_config", "latent_config"])
def test_round_trip_gives_the_same_bits(kind, request, tmp_path):
    config = request.getfixturevalue(kind)
    adapters = trained_lora(config)
    save_adapter(tmp_path, config, adapters, LORA, "base")
    again = load_adapter(tmp_path, config, LORA)
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
    assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {jnp.dtype("float32")}


def test_names_and_shapes_are_those_of_peft(model_config, latent_config, tmp_path):
    prefix = "base_model.model.model.layers"
    adapters = trained_lora(model_config)
    save_adapter(tmp_path, model_config, adapters, LORA, "base")
    tensors = load_file(tmp_path / WEIGHTS)
    assert len(tensors) == 3 * 3 * 2
    a, b = (tensors[f"{prefix}.2.self_attn.v_proj.lora_{which}.weight"] for which in "AB")
    assert (a.shape, b.shape) == ((2, 16), (8, 2))
    np.testing.assert_array_equal(a, np.asarray(adapters["layers"]["attention"]["v_proj"]["lora_a"][2]).T)
    raw = json.loads((tmp_path / CONFIG).read_text())
    assert raw["target_modules"] == ["q_proj", "k_proj", "v_proj"]
    assert (raw["r"], raw["lora_alpha"], raw["lora_dropout"]) == (2, 3.0, 0.1)

    adapters = trained_lora(latent_config)
    save_adapter(tmp_path, latent_config, adapters, LORA, "base")
    tensors, stacks = load_file(tmp_path / WEIGHTS), ("dense_layers", "layers", "layers")
    for layer, (stack, row) in enumerate(zip(stacks, (0, 0, 1), strict=True)):  # dense layers come first
        ours = adapters[stack]["attention"]["kv_a_proj"]["lora_b"][row]
        np.testing.assert_array_equal(
            tensors[f"{prefix}.{layer}.self_attn.kv_a_proj_with_mqa.lora_B.weight"], np.asarray(ours).T
        )
    modules = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    assert modules == ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]


def test_an_incomplete_adapter_is_none(model_config):
    adapters = trained_lora(model_config)
    assert has_adapter(model_config, adapters | {"else": {"leaf": jnp.zeros(1)}})
    del adapters["layers"]["attention"]["k_proj"]["lora_b"]
    assert not has_adapter(model_config, adapters) and not has_adapter(model_config, {})


@pytest.fixture
def directory(model_config, tmp_path):
    save_adapter(tmp_path, model_config, trained_lora(model_config), LORA, "base")
    return tmp_path


def refusal(directory, config):
    with pytest.raises(InputError) as error:
        load_adapter(directory, config, LORA)
    assert "\n" not in str(error.value) and str(directory) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', must be 'LORA'"),
        ({"r": 8}, "r is 8, must be 2"),
        ({"lora_alpha": 16}, "lora_alpha is 16, must be 3.0"),
        ({"use_rslora": True}, "use_rslora is True, must be False"),
        ({"use_dora": True}, "use_dora is True, must be False"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is {'q_proj': 4}, must be {}"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"bias": "all"}, "bias is 'all', must be 'none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"exclude_modules": ["k_proj"]}, "exclude_modules is ['k_proj'], must be None"),
        ({"target_modules": ["q_proj"]}, "target_modules is ['q_proj'], must be ['q_proj', 'k_proj', 'v_proj']"),
        ({"r": 4, "use_dora": True}, "r is 4, must be 2; use_dora is True"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_another_kind_of_adapter_is_refused_by_name(directory, model_config, changes, words):
    raw = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(raw | changes))
    assert words in refusal(directory, model_config)


def test_weights_that_are_not_read_are_told(directory, model_config, capsys):
    save_file({}, directory / "adapter_model-00001-of-00002.safetensors")
    load_adapter(directory, model_config, LORA)
    assert "weights not read: 'adapter_model-00001-of-00002.safetensors'\n" in capsys.readouterr().err


def test_what_cannot_be_a_path_is_refused(model_config):
    with pytest.raises(InputError, match="cannot be a path"):
        load_adapter("x" * 300, model_config, LORA)


def test_a_config_without_rank_is_refused(directory, model_config):
    raw = json.loads((directory / CONFIG).read_text())
    del raw["r"]
    (directory / CONFIG).write_text(json.dumps(raw))
    assert "r is None, must be 2" in refusal(directory, model_config)


def test_all_wrong_tensors_are_named_at_once(directory, model_config):
    tensors = load_file(directory / WEIGHTS)
    name = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight".format
    del tensors[name(0, "q_proj", "A")]
    tensors[name(1, "k_proj", "B")] = np.zeros((8, 5), np.float32)
    tensors[name(1, "o_proj", "A")] = np.zeros((2, 16), np.float32)
    save_file(tensors, directory / WEIGHTS)
    message = refusal(directory, model_config)
    assert "3 wrong tensors" in message
    assert f"{name(0, 'q_proj', 'A')} is missing" in message
    assert f"{name(1, 'k_proj', 'B')} has shape [8, 5], not [8, 2]" in message
    assert f"{name(1, 'o_proj', 'A')} is not part of the model" in message


def test_missing_and_broken_files(directory, model_config):
    weights = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    assert "cannot be read as a complete safetensors file" in refusal(directory, model_config)
    (directory / WEIGHTS).unlink()
    assert "missing weights file" in refusal(directory, model_config)
    (directory / CONFIG).write_text("{")
    assert "broken JSON" in refusal(directory, model_config)
    (directory / CONFIG).unlink()
    assert "not a PEFT adapter directory" in refusal(directory, model_config)


def test_lora_is_merged_in_float32(model_config, params):
    """Only the sum is rounded to the bfloat16 of the kernels."""
    adapters = trained_lora(model_config)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    merged = merge_adapters(half, adapters, AdapterConfig(LORA))
    for name in ("q_proj", "k_proj", "v_proj"):
        pair, kernel = adapters["layers"]["attention"][name], half["layers"]["attention"][name]["kernel"]
        a, b, w = (np.asarray(array, np.float64) for array in (pair["lora_a"], pair["lora_b"], kernel))
        exact = jnp.asarray(w + 1.5 * a @ b, jnp.float32).astype(jnp.bfloat16)
        ours = merged["layers"]["attention"][name]["kernel"]
        assert ours.dtype == jnp.bfloat16
        assert np.mean(np.asarray(ours != exact)) < 0.01  # sums halfway between two bfloat16 numbers
        merged["layers"]["attention"][name]["kernel"] = kernel
    jax.tree.map(np.testing.assert_array_equal, merged, half)  # nothing else has changed


def test_two_concatenated_adapters_are_written_as_one_of_twice_the_rank(model_config, tmp_path):
    """Their scale does not change: alpha doubles with the rank."""
    concatenated = jax.tree.map(
        lambda pair: {
            "lora_a": jnp.concatenate([pair["lora_a"]] * 2, axis=-1),
            "lora_b": jnp.concatenate([pair["lora_b"]] * 2, axis=-2),
        },
        trained_lora(model_config),
        is_leaf=lambda node: "lora_a" in node,
    )
    save_adapter(tmp_path, model_config, concatenated, LORA, "base")
    raw = json.loads((tmp_path / CONFIG).read_text())
    assert (raw["r"], raw["lora_alpha"]) == (2 * LORA.rank, 2 * LORA.alpha)
    again = load_adapter(tmp_path, model_config, LoraConfig(2 * LORA.rank, 2 * LORA.alpha))
    jax.tree.map(np.testing.assert_array_equal, again, concatenated)


def test_a_slot_without_a_gate_is_written_with_an_open_one(model_config, params):
    slot = SlotConfig(gate="none")
    tree, grafts = fill_slots(params, jnp.zeros((3, 1), jnp.int32), slot, None)
    index = grafts["layers"]["moe"]["slot"]["expert_index"]
    full = full_slot(params, tree["layers"]["moe"]["slot"], index, slot)
    assert full["gate"].shape == (3, 16, 1) and not full["gate"].any()
    np.testing.assert_array_equal(jax.nn.sigmoid(full["gate_bias"]), np.ones((3, 1)))


def test_a_slot_trained_by_lora_becomes_whole_experts(model_config, params):
    slot = SlotConfig(num_experts=2, training="lora", lora=LoraConfig(rank=3, alpha=6.0))
    expert_index = jnp.array([[4, 1], [0, 5], [3, 2]])
    tree, grafts = fill_slots(params, expert_index, slot, jax.random.PRNGKey(0))
    trained = jax.tree.map(lambda leaf: leaf + 1.0, tree["layers"]["moe"]["slot"])
    full = full_slot(params, trained, grafts["layers"]["moe"]["slot"]["expert_index"], slot)
    moe = params["layers"]["moe"]
    for name, weights in {
        "gate_proj": moe["gate_up"][..., :8],
        "up_proj": moe["gate_up"][..., 8:],
        "down_proj": moe["down"],
    }.items():
        a, b = trained[name]["lora_a"], trained[name]["lora_b"]
        np.testing.assert_allclose(full[name][1, 1], weights[1, 5] + 2.0 * a[1, 1] @ b[1, 1], atol=1e-4)
    assert "gate_bias" not in full


def test_an_exported_model_has_the_dtype_of_its_backbone(model_config, params, tmp_path):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    save_pretrained(tmp_path / "base", model_config, half)
    slots, grafts = fill_slots(half, jnp.zeros((3, 1), jnp.int32), SlotConfig(gate_init="closed"), None)
    (tmp_path / "out").mkdir()
    model = Decoder(model_config, AdapterConfig(LORA, SlotConfig()))
    variables = {"params": half, "adapters": slots, "grafts": grafts}
    save_transformers(tmp_path / "out", tmp_path / "base", model, variables)
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {array.dtype for array in tensors.values()} == {jnp.dtype("bfloat16")}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    personal = {name.removeprefix("model.layers.1.mlp.personal."): array.shape for name, array in tensors.items()}
    expected = {"gate.weight": (1, 16), "gate.bias": (1,), "experts.0.down_proj.weight": (16, 8)}
    assert expected.items() <= personal.items()
