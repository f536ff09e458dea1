"""Every family at the size of a released checkpoint, computed from shapes."""

from functools import partial
from pathlib import Path

import jax
import pytest

from flex_jax.federated.compression import tree_bytes
from flex_jax.federated.cost_model import count
from flex_jax.models.checkpoint import empty_params, read_model_config

PUBLISHED = {  # the number of parameters that the Hugging Face Hub shows for the checkpoint
    "DeepSeek-V2": 235_741_434_880,
    "DeepSeek-V2-Lite": 15_706_484_224,
    "Mixtral-8x7B-v0.1": 46_702_792_704,
    "OLMoE-1B-7B-0924": 6_919_161_856,
    "Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "Qwen3-30B-A3B": 30_532_122_624,
    "deepseek-moe-16b-base": 16_375_728_128,
}
SHAPES = Path(__file__).parents[2] / "benchmarks" / "shapes"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_released_checkpoint_has_its_published_number_of_parameters(name):
    config = read_model_config(SHAPES / f"{name}.json")
    plain, four_bits = (
        jax.eval_shape(partial(empty_params, config, dtype="bfloat16", quantisation=kind)) for kind in (None, "int4")
    )
    assert count(plain) == count(four_bits) == PUBLISHED[name]
    assert tree_bytes(plain) == 2 * count(plain)
    assert 0.26 < tree_bytes(four_bits) / tree_bytes(plain) < 0.31
