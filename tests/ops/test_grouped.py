"""The GPU kernel: interpreted on a CPU, and lowered for a GPU that is not there."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from flex_jax.models.decoder import Decoder
from flex_jax.ops import grouped
from flex_jax.ops.grouped import grouped_matmul
from flex_jax.ops.grouped_kernel import grouped_matmul_kernel
from flex_jax.ops.quantised import dequantise, quantise

SHAPES = {  # tokens, inputs, columns, group sizes
    "odd sizes, an empty group": (300, 72, 40, (10, 0, 150, 133, 7)),
    "one group of all": (37, 200, 130, (0, 0, 37, 0)),
    "tokens of no group": (90, 33, 50, (20, 30, 10)),
    "fewer tokens than groups": (5, 64, 128, (1, 0, 0, 2, 0, 0, 1, 0, 1)),
}


def operands(shape, dtype=jnp.float32, layers=3):
    tokens, inputs, columns, sizes = shape
    keys = jax.random.split(jax.random.PRNGKey(0))
    matrices = jax.random.normal(keys[1], (layers, len(sizes), inputs, columns), dtype)
    return jax.random.normal(keys[0], (tokens, inputs), dtype), matrices, jnp.array(sizes, jnp.int32)


def by_hand(tokens, matrices, sizes):
    ends = np.cumsum(sizes)
    parts = [tokens[end - size : end] @ matrix for end, size, matrix in zip(ends, sizes, matrices, strict=True)]
    return np.concatenate([*parts, np.zeros((len(tokens) - ends[-1], matrices.shape[-1]))])


@pytest.fixture
def on_gpu(monkeypatch):
    """`grouped_matmul` as on a GPU, its kernel interpreted."""
    monkeypatch.setattr(grouped, "_has_triton", lambda: True)
    monkeypatch.setattr(grouped, "grouped_matmul_kernel", partial(grouped_matmul_kernel, interpret=True))


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_each_group_is_multiplied_by_its_matrix_of_the_layer(shape, transposed, on_gpu):
    tokens, stack, sizes = operands(shape)
    stored = jnp.swapaxes(stack, 2, 3) if transposed else stack
    ours = jax.jit(partial(grouped_matmul, transposed=transposed))(
        tokens, stored, layer=jnp.int32(2), group_sizes=sizes
    )
    expected = by_hand(*(np.asarray(array, np.float64) for array in (tokens, stack[2])), np.asarray(sizes))
    assert np.linalg.norm(ours - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_matrices_are_multiplied_by_their_values(kind, on_gpu):
    tokens, stack, sizes = operands(SHAPES["odd sizes, an empty group"])
    stored = quantise(stack, kind, jnp.float32)
    ours = grouped_matmul(tokens, stored, layer=1, group_sizes=sizes)
    expected = by_hand(*(np.asarray(array, np.float64) for array in (tokens, dequantise(stored)[1])), np.asarray(sizes))
    assert np.linalg.norm(ours - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("remat", [True, False])
def test_a_model_on_a_gpu_copies_no_layer_of_experts(remat, model_config, monkeypatch):
    """Lowered for a GPU, a gradient reads the stack of layers in place: no slice, transpose or dense product of it."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(grouped, "_has_triton", lambda: True)
    model, tokens = Decoder(model_config, remat=remat), jnp.zeros((2, 64), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.PRNGKey(0), tokens)["params"]

    def loss(embedding, params, tokens):
        return model.apply({"params": params | {"embedding": embedding}}, tokens).logits.sum()

    gpu = AbstractDevice("NVIDIA H100 80GB HBM3", 132, platform="cuda")
    shapes = params["embedding"], params, jax.ShapeDtypeStruct((2, 64), jnp.int32)
    with use_abstract_mesh(AbstractMesh((1,), ("device",), abstract_device=gpu)):
        text = jax.jit(jax.grad(loss)).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    c = model_config
    layer = f"{c.num_experts}x{c.hidden_size}x{2 * c.moe_intermediate_size}x"
    made = re.findall(rf"stablehlo\.(\w+)[^\n]*-> tensor<(?:1x)?{layer}", text)
    assert "gpu.triton" in text and not made


@pytest.mark.parametrize("capability, kernel", [("7.5", False), ("8.0", True), ("12.0", True), ("gfx942", False)])
def test_gpus_without_triton_use_xla(capability, kernel, monkeypatch):
    class Device:
        compute_capability = capability

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert grouped._has_triton() == kernel
