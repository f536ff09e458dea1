"""The GPU kernel, run step by step on a CPU, and lowered for a GPU that is not there."""

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

SHAPES = {  # rows, inputs, columns, sizes
    "odd sizes, an empty group": (300, 72, 40, (10, 0, 150, 133, 7)),
    "one group of all": (37, 200, 130, (0, 0, 37, 0)),
    "rows of no group": (90, 33, 50, (20, 30, 10)),
    "fewer rows than groups": (5, 64, 128, (1, 0, 0, 2, 0, 0, 1, 0, 1)),
}


def operands(shape, dtype=jnp.float32, layers=3):
    rows, inputs, columns, sizes = shape
    keys = jax.random.split(jax.random.PRNGKey(0))
    matrices = jax.random.normal(keys[1], (layers, len(sizes), inputs, columns), dtype)
    return jax.random.normal(keys[0], (rows, inputs), dtype), matrices, jnp.array(sizes, jnp.int32)


def by_hand(rows, matrices, sizes):
    ends = np.cumsum(sizes)
    parts = [rows[end - size : end] @ matrix for end, size, matrix in zip(ends, sizes, matrices, strict=True)]
    return np.concatenate([*parts, np.zeros((len(rows) - ends[-1], matrices.shape[-1]))])


@pytest.fixture
def on_gpu(monkeypatch):
    """`grouped_matmul` as on a GPU, its kernel interpreted."""
    monkeypatch.setattr(grouped, "_has_triton", lambda: True)
    monkeypatch.setattr(grouped, "grouped_matmul_kernel", partial(grouped_matmul_kernel, interpret=True))


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_each_group_meets_its_matrix_of_the_layer(shape, transposed, on_gpu):
    rows, stack, sizes = operands(shape)
    held = jnp.swapaxes(stack, 2, 3) if transposed else stack
    ours = jax.jit(partial(grouped_matmul, transposed=transposed))(rows, held, layer=jnp.int32(2), sizes=sizes)
    expected = by_hand(*(np.asarray(array, np.float64) for array in (rows, stack[2])), np.asarray(sizes))
    assert np.linalg.norm(ours - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_integers_are_multiplied_as_their_values(kind, on_gpu):
    rows, stack, sizes = operands(SHAPES["odd sizes, an empty group"])
    held = quantise(stack, kind, jnp.float32)
    ours = grouped_matmul(rows, held, layer=1, sizes=sizes)
    expected = by_hand(*(np.asarray(array, np.float64) for array in (rows, dequantise(held)[1])), np.asarray(sizes))
    assert np.linalg.norm(ours - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("remat", [True, False])
def test_a_model_on_a_gpu_copies_no_layer_of_experts(remat, model_config, monkeypatch):
    """What XLA is handed for a GPU, with gradient: kernels that read the stack of layers as it lies, no slice of it, no
    transpose and no dense product."""
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
    layer = f"{c.experts}x{c.width}x{2 * c.expert_width}x"
    made = re.findall(rf"stablehlo\.(\w+)[^\n]*-> tensor<(?:1x)?{layer}", text)
    assert "gpu.triton" in text and not made


@pytest.mark.parametrize("capability, kernel", [("7.5", False), ("8.0", True), ("12.0", True), ("gfx942", False)])
def test_gpus_that_triton_does_not_know_use_xla(capability, kernel, monkeypatch):
    class Device:
        compute_capability = capability

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert grouped._has_triton() == kernel
