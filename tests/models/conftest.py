"""The fixtures of the model tests."""

import dataclasses

import pytest
from safetensors.numpy import load_file

from flex_jax.models.checkpoint import INDEX, WEIGHTS, save_pretrained, write_shards


@pytest.fixture(scope="session")
def latent_config(model_config):
    """Multi-head latent attention behind one dense layer."""
    return dataclasses.replace(
        model_config,
        family="deepseek_v2",
        num_kv_heads=4,
        head_dim=0,
        attention_bias=False,
        first_k_dense_replace=1,
        intermediate_size=20,
        kv_lora_rank=6,
        q_lora_rank=5,
        qk_nope_head_dim=4,
        qk_rope_head_dim=2,
        v_head_dim=3,
    )


@pytest.fixture
def directory(tmp_path, model_config, params):
    save_pretrained(tmp_path / "model", model_config, params)
    return tmp_path / "model"


@pytest.fixture
def shards(directory):
    """The same checkpoint in several files and their index; returns the files."""
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    write_shards(directory, tensors.items(), shard_bytes=sum(array.nbytes for array in tensors.values()) / 3)
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) > 2 and (directory / INDEX).is_file()
    return files
