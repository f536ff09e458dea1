"""What a checkpoint says twice is refused or told, and files that cannot be read are one line."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flex_jax import load_pretrained
from flex_jax.errors import InputError
from flex_jax.models.checkpoint import INDEX, WEIGHTS, find_checkpoint, read_model_config
from flex_jax.models.rotary import frequencies

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def change_config(directory, **values):
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | values))


def test_a_file_beside_an_index_is_refused_whichever_is_out_of_date(directory, shards):
    """transformers reads the file, and the index may name the weights of another training."""
    save_file({name: array + 1 for path in shards for name, array in load_file(path).items()}, directory / WEIGHTS)
    with pytest.raises(InputError, match=f"has {WEIGHTS}, .* and {INDEX}, .*all of them are there.*out of date"):
        load_pretrained(directory)
    shards[1].unlink()
    with pytest.raises(InputError, match=f"has {WEIGHTS}, .* and {INDEX}, .*{shards[1].name} is missing.*out of date"):
        load_pretrained(directory)
    (directory / INDEX).unlink()
    load_pretrained(directory)


def test_weights_that_are_not_read_are_told(directory, shards, capsys):
    load_pretrained(directory)
    assert "not read" not in capsys.readouterr().err
    (directory / "model-00001-of-00002.safetensors").write_bytes(shards[0].read_bytes())
    load_pretrained(directory)
    told = "weights not read: 'model-00001-of-00002.safetensors'\n"
    assert capsys.readouterr().err == f"flex_jax: {directory}: {told}"
    (directory / INDEX).unlink()
    with pytest.raises(InputError, match=f"missing weights file {WEIGHTS}, or {INDEX} that names 'model-00001"):
        load_pretrained(directory)


def test_a_tied_head_with_other_values_is_refused(directory):
    """transformers would not tie it."""
    change_config(directory, tie_word_embeddings=True)
    with pytest.raises(InputError, match="lm_head.weight differs from model.embed_tokens.weight, though tie_word"):
        load_pretrained(directory)
    tensors = load_file(directory / WEIGHTS)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, directory / WEIGHTS)
    load_pretrained(directory)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": YARN},
            "rope_parameters .*'default'.* and rope_scaling .*'yarn'.* differ .only one of them",
        ),
        (
            {"rope_parameters": YARN | {"rope_theta": 5e4}, "rope_scaling": YARN},
            "rope_parameters .*50000.0.* and rope_scaling .*'yarn'.* differ .only one of them",
        ),
        ({"rope_theta": 5e5}, "rope_parameters.rope_theta 10000.0 and rope_theta 500000.0 .only one value"),
        (
            {"rope_parameters": YARN | {"type": "linear"}},
            "rope_type 'yarn' and rope_parameters.type 'linear' .only one",
        ),
        (
            {"rope_parameters": YARN, "original_max_position_embeddings": 32},
            "original_max_position_embeddings 16 and original_max_position_embeddings 32 .only one value",
        ),
        ({"rope_parameters": YARN | {"original_max_position_embeddings": 0.5}}, "0.5 .only a number of at least 1"),
        ({"partial_rotary_factor": [1]}, "partial_rotary_factor .only 1.0"),
        ({"num_local_experts": 8}, "num_experts 6 and num_local_experts 8 .only one value"),
        ({"model_type": "qwen3_moe", "num_local_experts": 8}, "num_experts 6 and num_local_experts 8 .only one value"),
        (
            {"model_type": "deepseek", "n_routed_experts": 8, "intermediate_size": 8},
            "n_routed_experts 8 and num_experts 6 .only one value",
        ),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types .only 'full_attention'"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps 1000.* .only a number above 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_contradiction_is_refused_by_name(directory, values, words):
    change_config(directory, **values)
    with pytest.raises(InputError, match=words):
        load_pretrained(directory)


@pytest.mark.parametrize(
    "values",
    [
        {"rope_parameters": YARN | {"rope_theta": 1e4}, "rope_scaling": YARN | {"rope_theta": 1e4}},
        {"rope_parameters": {}, "rope_scaling": YARN},
        {"rope_parameters": None, "rope_scaling": YARN | {"truncate": None}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 16},
    ],
)
def test_both_forms_of_yarn_are_read_as_transformers_does(directory, values):
    """The older form, and the trained length at either of its places."""
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    auto = pytest.importorskip("transformers").AutoConfig
    change_config(directory, **values)
    angles, factor = rope_utils.ROPE_INIT_FUNCTIONS["yarn"](auto.from_pretrained(directory), "cpu")
    rope = read_model_config(directory / "config.json").rope
    np.testing.assert_allclose(frequencies(rope, 4, jnp.array([4]))[0], angles, rtol=1e-6)
    assert rope.attention_factor == pytest.approx(factor)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"rope_theta": 1, "rope_theta": 2}', "broken JSON .key 'rope_theta' stands twice"),
        ("[" * 100_000, "broken JSON .maximum recursion"),
        ('{"hidden_size": ' + "9" * 10_000 + "}", "broken JSON .*digits"),
        ('{"model_type": "a\0b"}', "broken JSON"),
        (b'{"model_type": "\xff"}', "broken JSON .*utf-8"),
        ("[]", "not a JSON object"),
    ],
    ids=["twice", "nested", "digits", "NUL", "no UTF-8", "list"],
)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_cannot_be_read_is_one_line(directory, shards, name, text, words):
    (directory / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=words) as error:
        load_pretrained(directory)
    assert str(directory / name) in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "a\0b.safetensors", "a\ud800.safetensors"])
def test_an_impossible_name_in_an_index_is_refused(directory, shards, name):
    (directory / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(InputError, match="File name too long|is not the name of a file next to it"):
        load_pretrained(directory)


@pytest.mark.parametrize("path", ["x" * 300, "~nobody-of-that-name/model", "a\0b"])
def test_what_cannot_be_a_path_is_refused(path):
    with pytest.raises(InputError, match="cannot be a path|no such checkpoint"):
        find_checkpoint(path)
