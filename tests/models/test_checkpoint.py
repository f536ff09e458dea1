"""Hugging Face directories: round trip, dtypes, and every fault named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flex_jax import load_pretrained
from flex_jax.errors import InputError
from flex_jax.models.checkpoint import WEIGHTS, save_pretrained


@pytest.fixture
def directory(tmp_path, model_config, params):
    save_pretrained(tmp_path / "model", model_config, params)
    return tmp_path / "model"


def change(directory, edit):
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS)


def change_config(directory, **values):
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | values))


def test_round_trip_gives_the_same_bits(directory, model_config, params):
    model, loaded = load_pretrained(directory)
    assert model.config == model_config
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_bfloat16_in_and_out(tmp_path, directory, model_config):
    _, half = load_pretrained(directory, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    save_pretrained(tmp_path / "half", model_config, half)
    _, again = load_pretrained(tmp_path / "half", dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, again, half)


def test_all_wrong_tensors_are_named_at_once(directory):
    def edit(tensors):
        del tensors["model.layers.1.mlp.experts.4.up_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["lm_head.weight"] = np.zeros((3, 2), np.float32)

    change(directory, edit)
    with pytest.raises(InputError) as error:
        load_pretrained(directory)
    message = str(error.value)
    assert "3 wrong tensors" in message and "\n" not in message
    assert "model.layers.1.mlp.experts.4.up_proj.weight is missing" in message
    assert "model.norm.weight is missing" in message
    assert "lm_head.weight has shape [3, 2], not [60, 16]" in message


def test_missing_and_broken_files(tmp_path, directory):
    with pytest.raises(InputError, match="no config.json"):
        load_pretrained(tmp_path)
    weights = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_pretrained(directory)
    (directory / WEIGHTS).unlink()
    with pytest.raises(InputError, match="missing weights file"):
        load_pretrained(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(InputError, match="broken JSON"):
        load_pretrained(directory)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "llama"}, "'llama' is not supported; supported: deepseek, "),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope scaling 'longrope'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_refused_by_name(directory, values, words):
    change_config(directory, **values)
    with pytest.raises(InputError, match=words):
        load_pretrained(directory)


def test_a_missing_key_of_the_config_is_named(directory):
    raw = json.loads((directory / "config.json").read_text())
    del raw["num_experts"]
    (directory / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="'num_experts' is missing"):
        load_pretrained(directory)
