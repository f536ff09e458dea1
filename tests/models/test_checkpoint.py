"""Hugging Face directories: round trip, dtypes, and errors that name every fault."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from flex_jax import load_pretrained
from flex_jax.errors import InputError
from flex_jax.models.checkpoint import INDEX, WEIGHTS, empty_params, find_checkpoint, save_pretrained
from flex_jax.models.decoder import Decoder
from flex_jax.ops.quantised import Quantised, dequantise

DEEPSEEK = {
    "model_type": "deepseek_v2",
    "n_routed_experts": 6,
    "intermediate_size": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
}


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


def test_shards_hold_the_same_bits(directory, shards, params):
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(directory)[1], params)


def test_a_missing_or_truncated_shard_is_named(directory, shards):
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=f"{shards[1].name}: cannot be read as a complete safetensors file"):
        load_pretrained(directory)
    shards[1].unlink()
    with pytest.raises(InputError, match=f"{shards[1].name}: missing weights file"):
        load_pretrained(directory)
    for index, words in (
        ({}, "'weight_map' is missing"),
        ({"weight_map": {"model.norm.weight": 3}}, "3 is not the name of a file next to it"),
        ({"weight_map": {"model.norm.weight": "../other.safetensors"}}, "other.safetensors' is not the name of a file"),
    ):
        (directory / INDEX).write_text(json.dumps(index))
        with pytest.raises(InputError, match=words):
            load_pretrained(directory)


def test_a_tensor_in_two_shards_is_named(directory, shards):
    tensors = load_file(shards[1])
    name = sorted(load_file(shards[0]))[0]
    save_file(tensors | {name: np.zeros(1, np.float32)}, shards[1])
    with pytest.raises(InputError, match=f"tensor {name} is also in another file of the checkpoint"):
        load_pretrained(directory)


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


def test_unknown_tensors_are_named_and_harmless_ones_are_not(directory):
    def harmless(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)

    def unknown(tensors):
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(4, np.float32)

    change(directory, harmless)
    load_pretrained(directory)
    change(directory, unknown)
    with pytest.raises(InputError, match="1 wrong tensor: model.layers.0.self_attn.q_norm.weight is not part of"):
        load_pretrained(directory)


def test_a_type_that_cannot_be_read_is_named(directory):
    def edit(tensors):
        tensors["model.norm.weight"] = np.ones(16, np.int8)

    change(directory, edit)
    with pytest.raises(InputError, match="model.norm.weight has type I8, not one of F64, F32, F16, BF16"):
        load_pretrained(directory)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_tensors_of_another_family_are_one_short_line(directory, family):
    change_config(directory, model_type=family, num_local_experts=6, intermediate_size=8)
    with pytest.raises(InputError) as error:
        load_pretrained(directory)
    message = str(error.value)
    assert "wrong tensors" in message and " more" in message and "\n" not in message and len(message) < 1200


def test_another_vocabulary_is_named(directory):
    change_config(directory, vocab_size=80)
    with pytest.raises(InputError, match=r"embed_tokens.weight has shape \[60, 16\], not \[80, 16\]"):
        load_pretrained(directory)


def test_a_matrix_that_cannot_be_quantised_is_named(tmp_path, model_config):
    odd = dataclasses.replace(model_config, moe_intermediate_size=7)
    save_pretrained(tmp_path, odd, Decoder(odd).init(jax.random.PRNGKey(0), jnp.zeros((1, 4), jnp.int32))["params"])
    load_pretrained(tmp_path)
    with pytest.raises(InputError, match="layers/moe/down has 7 inputs; int8 needs an even number"):
        load_pretrained(tmp_path, quantisation="int8")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_layers_hold_the_nearest_integers(directory, params, kind):
    model, frozen = load_pretrained(directory, quantisation=kind)
    bound = {"int8": 0.01, "int4": 0.12}[kind]
    plain = flatten_dict(params, sep="/")
    for path, leaf in flatten_dict(frozen, sep="/").items():
        if path.endswith("kernel") or path.split("/")[-1] in ("gate_up", "down"):
            assert isinstance(leaf, Quantised) and leaf.shape == plain[path].shape
            error = np.linalg.norm(dequantise(leaf) - plain[path]) / np.linalg.norm(plain[path])
            assert 0 < error < bound, path
        else:
            np.testing.assert_array_equal(leaf, plain[path])
    shapes = jax.eval_shape(lambda: empty_params(model.config, dtype="float32", quantisation=kind))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), frozen
    )


def test_parameters_go_straight_to_the_devices_they_are_sharded_over(directory):
    """In a separate process, which has two devices."""
    program = f"""
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from flex_jax import load_pretrained
mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
def sharding(path, shape):
    experts = path.startswith("layers/moe/") and len(shape) == 4
    return NamedSharding(mesh, PartitionSpec(None, "expert") if experts else PartitionSpec())
for kind in (None, "int4"):
    model, plain = load_pretrained({str(directory)!r}, quantisation=kind)
    divided, sharded = load_pretrained({str(directory)!r}, quantisation=kind, sharding=sharding)
    assert model.stacked and not divided.stacked  # a divided stack is never all-gathered
    jax.tree.map(np.testing.assert_array_equal, plain, sharded)
    for leaf in jax.tree.leaves(sharded["layers"]["moe"]["gate_up"]):
        assert [shard.data.shape[1] for shard in leaf.addressable_shards] == [3, 3], leaf.sharding
    assert len(sharded["embedding"].addressable_shards) == 2
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=Path(__file__).parents[2])


def test_loading_takes_little_more_memory_than_the_parameters():
    """benchmarks/loading.py on a checkpoint of 0.5 GB. benchmarks/README.md has its result for 2 GB and more."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "benchmarks/loading.py", "--gigabytes", "0.5", "--shards", "3"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    result = subprocess.run(command, check=True, cwd=root, env=environment, capture_output=True, text=True)
    measured = json.loads(result.stdout)
    assert measured["files"] >= 3 and measured["parameters_gb"] > 0.4
    assert 0.95 < measured["ratio"] < 1.15


def test_what_is_no_directory_is_looked_up_on_the_hub(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="not the name OWNER/MODEL of a Hub model"):
        find_checkpoint(tmp_path / "nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="no-one/no-model: no such directory here.* run: hf download no-one/no-model"):
        find_checkpoint("no-one/no-model")


def test_a_model_in_the_hub_cache_loads_by_its_name(directory, tmp_path, monkeypatch, params):
    """The cache has the layout of huggingface_hub and is filled by hand: no network."""
    cached = tmp_path / "hub" / "models--someone--small"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots").mkdir()
    directory.rename(cached / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    jax.tree.map(np.testing.assert_array_equal, load_pretrained("someone/small")[1], params)


def test_missing_and_broken_files(tmp_path, directory):
    with pytest.raises(InputError, match="no config.json"):
        load_pretrained(tmp_path)
    weights = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="cannot be read as a complete safetensors file"):
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
        ({"rope_scaling": {"type": "su", "factor": 2.0}, "rope_parameters": None}, "rope scaling 'su'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_size": "sixteen"}, "hidden_size 'sixteen' .only an integer from 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0 .only an integer from 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 .only an integer from 1 to 1000000"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan .only a number above 0"),
        ({"model_type": ["qwen2_moe"]}, "model_type .'qwen2_moe'. is not supported"),
        ({"rope_parameters": [1]}, "rope_parameters .1. .only one object"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "only one object"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "four"}}, "factor 'four' .only a number above 0"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": -1}}, "factor -1 .only a number above 0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1}}, "rope_theta 1.0 .only a number above 1"),
        ({"num_experts_per_tok": 7}, "7 experts per token .only up to the 6 experts"),
        ({"num_key_value_heads": 3}, "3 key-value heads .only a divisor of the 4 query heads"),
        ({"model_type": "mixtral", "num_local_experts": 6, "intermediate_size": 8, "sliding_window": 64}, "sliding"),
        ({"model_type": "olmoe", "intermediate_size": 8, "clip_qkv": 8.0}, "clip_qkv 8.0"),
        (DEEPSEEK | {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' .only 'greedy' or 'group_limited_greedy'"),
        (DEEPSEEK | {"norm_topk_prob": True}, "norm_topk_prob True"),
        (DEEPSEEK | {"first_k_dense_replace": 3}, "3 dense layers .only fewer than the 3 layers"),
        (DEEPSEEK | {"n_shared_experts": "2"}, "n_shared_experts '2' .only an integer"),
        (DEEPSEEK | {"topk_method": "group_limited_greedy", "n_group": "2", "topk_group": 1}, "only integers"),
        (
            DEEPSEEK | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
            "4 groups of 6 experts, 2 per token .only equal groups",
        ),
        (DEEPSEEK | {"model_type": "deepseek", "scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
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
