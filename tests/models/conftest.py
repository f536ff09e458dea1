"""The fixtures of the model tests."""

import dataclasses

import pytest


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
