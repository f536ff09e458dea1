"""The frozen operators against their floors: milliseconds, GFLOP/s and share of the device's matmul rate.

    python benchmarks/operators.py benchmarks/shapes/small.json --tokens 2048 --plot operators.png

For the shape in a config.json, in --dtype, on --tokens tokens in sequences of --sequence-length: the experts that
tokens are routed to, attention, and the loss with the head. Each is timed forward, and forward with the gradient of all
that depends on the tokens. What the package calls on this device is marked "in use"; beside it the same operator by
other means: the experts by `lax.ragged_dot`, by `tokamax.ragged_dot` where tokamax is installed, and all experts on all
tokens where memory allows; on GPU the attention of `jax.nn.dot_product_attention` by XLA and by cuDNN.

`share` is floor over time, the floor being the floating-point operations that the operator cannot do without (of
causal attention the half that is seen; of the gradient no weight's and nothing computed twice) at the matmul rate
measured just before. Prints one JSON line; with --plot, draws the shares.
"""

import argparse
import importlib
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from measure import device, draw_bars, emit, matmul_rate, random_params, seconds

from flex_jax.models.checkpoint import read_model_config
from flex_jax.models.config import ModelConfig
from flex_jax.ops.attention import FLASH_DTYPES, FLASH_SIZE, attention
from flex_jax.ops.cross_entropy import token_cross_entropy
from flex_jax.ops.experts import ExpertWeights, dense_experts, frozen_experts

PASSES = "forward", "gradient"
SMALL_BYTES = 2e9  # of all experts' hidden layers and outputs on all tokens, above which these are left out


class Operator(NamedTuple):
    function: Callable
    active: tuple[jax.Array, ...]  # arguments that depend on the tokens: those with a gradient
    fixed: tuple  # the arguments after them
    forward: float  # multiply-adds that cannot be done without
    backward: float
    context: Callable = nullcontext  # in which it is traced


def arrays(dtype: str, *shapes: tuple[int, ...]) -> list[jax.Array]:
    return random_params([jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes])


def grouped_by(matmul: Callable):
    """Within it `frozen_experts` computes its groups with this matmul, on any device."""

    def map_groups(function, rows, stacks, layer, sizes):
        return function(partial(matmul, layer=layer, sizes=sizes), *rows, *stacks)

    return mock.patch("flex_jax.ops.experts.map_groups", map_groups)


def by_ragged_dot(ragged_dot: Callable) -> Callable:
    """`grouped_matmul` by an operator of a library, with the arguments of `lax.ragged_dot`."""

    def matmul(rows, stack, transposed=False, *, layer, sizes):
        matrices = jnp.swapaxes(stack[layer], 1, 2) if transposed else stack[layer]
        return ragged_dot(rows, matrices, sizes, preferred_element_type=jnp.float32).astype(rows.dtype)

    return matmul


def expert_operators(c: ModelConfig, tokens: int, dtype: str) -> dict[str, Operator]:
    shapes = (tokens, c.width), (c.experts, c.width, 2 * c.expert_width), (c.experts, c.expert_width, c.width)
    x, *weights = arrays(dtype, *shapes)
    scores = jax.random.normal(jax.random.PRNGKey(0), (tokens, c.experts))
    weight, index = jax.lax.top_k(jax.nn.softmax(scores), c.experts_per_token)
    needed = 3.0 * tokens * c.experts_per_token * c.width * c.expert_width
    fixed = (ExpertWeights(*(matrices[None] for matrices in weights)), index)

    def operator(experts=frozen_experts, context=nullcontext):
        def function(x, weight, weights, index):
            return experts(x, weights, index, weight)

        return Operator(function, (x, weight), fixed, needed, needed, context)

    operators = {"experts (in use)": operator()}
    libraries = {"lax": jax.lax}
    if importlib.util.find_spec("tokamax"):
        libraries["tokamax"] = importlib.import_module("tokamax")
    for name, library in libraries.items():
        context = partial(grouped_by, by_ragged_dot(library.ragged_dot))
        operators[f"experts: {name}.ragged_dot"] = operator(context=context)
    if tokens * c.experts * (2 * c.expert_width + c.width) * x.dtype.itemsize <= SMALL_BYTES:
        operators["experts: all on all"] = operator(dense_experts)
    return operators


def attention_operators(c: ModelConfig, tokens: int, sequence: int, dtype: str) -> dict[str, Operator]:
    rows = tokens // sequence, sequence
    query, key, value = arrays(
        dtype, (*rows, c.heads, c.key_dim), (*rows, c.kv_heads, c.key_dim), (*rows, c.kv_heads, c.value_dim)
    )
    scale = c.key_dim**-0.5
    functions = {"attention (in use)": lambda *arrays: attention(*arrays, None, scale)}
    if jax.default_backend() == "gpu" and c.key_dim == c.value_dim:
        flash = query.dtype in FLASH_DTYPES and c.key_dim <= FLASH_SIZE
        for name in ("xla", "cudnn") if flash else ("xla",):
            functions[f"attention: {name}"] = partial(
                jax.nn.dot_product_attention, scale=scale, is_causal=True, implementation=name
            )
    needed = tokens * sequence * c.heads * (c.key_dim + c.value_dim) / 2
    return {
        name: Operator(function, (query, key, value), (), needed, 2 * needed) for name, function in functions.items()
    }


def loss_operators(c: ModelConfig, tokens: int, dtype: str) -> dict[str, Operator]:
    features, head = arrays(dtype, (tokens, c.width), (c.vocab_size, c.width))
    targets = jax.random.randint(jax.random.PRNGKey(0), (tokens,), 0, c.vocab_size)
    needed = 1.0 * tokens * c.width * c.vocab_size
    fixed = head, targets, jnp.ones(tokens, bool)
    return {"cross-entropy (in use)": Operator(token_cross_entropy, (features,), fixed, needed, needed)}


def time_operator(operator: Operator, dtype: str) -> dict:
    """The matmul rate, and what each pass makes of it."""

    def with_gradient(active, fixed):
        y, pull_back = jax.vjp(lambda *active: operator.function(*active, *fixed), *active)
        return y, pull_back(y)

    def forward(active, fixed):
        return operator.function(*active, *fixed)

    rate = matmul_rate(dtype)
    told = {"matmul_gflops": round(rate / 1e9, 1)}
    needed = operator.forward, operator.forward + operator.backward
    for name, function, multiply_adds in zip(PASSES, (forward, with_gradient), needed, strict=True):
        with operator.context():
            taken = seconds(jax.jit(function), operator.active, operator.fixed)
        achieved = 2 * multiply_adds / taken
        told[name] = {
            "ms": round(1e3 * taken, 3),
            "gflops": round(achieved / 1e9, 1),
            "share": round(achieved / rate, 3),
        }
    return told


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = Path(__file__).parent / "shapes"
    parser.add_argument("model", type=Path, nargs="?", default=shapes / "small.json", help="a config.json")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--sequence-length", type=int, default=512, help="must divide the tokens")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    config, tokens, dtype = read_model_config(options.model), options.tokens, options.dtype
    if tokens % options.sequence_length:
        parser.error(f"--sequence-length {options.sequence_length} must divide --tokens {tokens}")
    told = {}
    for operators in (
        partial(expert_operators, config, tokens, dtype),
        partial(attention_operators, config, tokens, options.sequence_length, dtype),
        partial(loss_operators, config, tokens, dtype),
    ):  # one kind after another, so that only its arrays are held
        told |= {name: time_operator(operator, dtype) for name, operator in operators().items()}
    result = {"model": options.model.stem, "dtype": dtype, "tokens": tokens, "sequence_length": options.sequence_length}
    result |= {"operators": told, "device": device()}
    if options.plot:
        shares = {f"{name}, {kind}": row[kind]["share"] for name, row in told.items() for kind in PASSES}
        title = f"{options.model.stem}, {tokens:,} tokens in {dtype}: {device()}"
        draw_bars(options.plot, title, "share of the matmul rate", shares)
    return emit(result)


if __name__ == "__main__":
    main()
