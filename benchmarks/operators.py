"""Measures the frozen operators: milliseconds, GFLOP/s, and the share of the device's matmul rate that they reach.

    python benchmarks/operators.py benchmarks/shapes/small.json --tokens 2048 --plot operators.png

The operators are the routed experts, attention, and the loss with the head, for the shape in a config.json, in --dtype,
on --tokens tokens in sequences of --sequence-length. Each is timed forward, and forward with the gradient of everything
that depends on the tokens. What the package uses on this device is marked "in use". It is compared with other
implementations: experts with `lax.ragged_dot`, with `tokamax.ragged_dot` if tokamax is installed, and all experts on
all tokens if memory allows; and on GPU `jax.nn.dot_product_attention` with XLA and with cuDNN.

`share` is the least possible time over the measured time. The least possible time is that of the necessary
floating-point operations at the matmul rate, which is measured just before. Causal attention counts half of the scores;
the gradient counts no weight gradients and no recomputation. Prints one JSON line; with --plot, draws the shares.
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
DENSE_LIMIT = 2e9  # bytes of all experts' hidden layers and outputs on all tokens; above it, they are not measured


class Operator(NamedTuple):
    """An operator with its arguments and the multiply-adds that it needs at least."""

    function: Callable
    active: tuple[jax.Array, ...]  # arguments that depend on the tokens; these get gradients
    fixed: tuple  # the arguments after them
    forward: float  # multiply-adds
    backward: float
    context: Callable = nullcontext  # the context in which it is traced


def arrays(dtype: str, *shapes: tuple[int, ...]) -> list[jax.Array]:
    """Returns pseudo-random arrays of these shapes."""
    return random_params([jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes])


def grouped_by(matmul: Callable):
    """Returns a context in which `frozen_experts` uses this grouped matmul, on any device."""

    def grouped_apply(function, tokens, stacks, layer, group_sizes):
        return function(partial(matmul, layer=layer, group_sizes=group_sizes), *tokens, *stacks)

    return mock.patch("flex_jax.ops.experts.grouped_apply", grouped_apply)


def by_ragged_dot(ragged_dot: Callable) -> Callable:
    """Returns a `grouped_matmul` that calls an operator with the arguments of `lax.ragged_dot`."""

    def matmul(tokens, stack, transposed=False, *, layer, group_sizes):
        matrices = jnp.swapaxes(stack[layer], 1, 2) if transposed else stack[layer]
        return ragged_dot(tokens, matrices, group_sizes, preferred_element_type=jnp.float32).astype(tokens.dtype)

    return matmul


def expert_operators(c: ModelConfig, tokens: int, dtype: str) -> dict[str, Operator]:
    """Returns the routed experts in several implementations."""
    width, size = c.hidden_size, c.moe_intermediate_size
    x, *weights = arrays(dtype, (tokens, width), (c.num_experts, width, 2 * size), (c.num_experts, size, width))
    scores = jax.random.normal(jax.random.PRNGKey(0), (tokens, c.num_experts))
    routing_weight, expert_index = jax.lax.top_k(jax.nn.softmax(scores), c.num_experts_per_tok)
    needed = 3.0 * tokens * c.num_experts_per_tok * width * size
    fixed = (ExpertWeights(*(matrices[None] for matrices in weights)), expert_index)

    def operator(experts=frozen_experts, context=nullcontext):
        def function(x, routing_weight, weights, expert_index):
            return experts(x, weights, expert_index, routing_weight)

        return Operator(function, (x, routing_weight), fixed, needed, needed, context)

    operators = {"experts (in use)": operator()}
    libraries = {"lax": jax.lax}
    if importlib.util.find_spec("tokamax"):
        libraries["tokamax"] = importlib.import_module("tokamax")
    for name, library in libraries.items():
        context = partial(grouped_by, by_ragged_dot(library.ragged_dot))
        operators[f"experts: {name}.ragged_dot"] = operator(context=context)
    if tokens * c.num_experts * (2 * size + width) * x.dtype.itemsize <= DENSE_LIMIT:
        operators["experts: all on all"] = operator(dense_experts)
    return operators


def attention_operators(c: ModelConfig, tokens: int, sequence: int, dtype: str) -> dict[str, Operator]:
    """Returns attention in several implementations."""
    grid, heads, kv_heads = (tokens // sequence, sequence), c.num_heads, c.num_kv_heads
    query, key, value = arrays(
        dtype, (*grid, heads, c.key_dim), (*grid, kv_heads, c.key_dim), (*grid, kv_heads, c.value_dim)
    )
    scale = c.key_dim**-0.5
    functions = {"attention (in use)": lambda *arrays: attention(*arrays, None, scale)}
    if jax.default_backend() == "gpu" and c.key_dim == c.value_dim:
        flash = query.dtype in FLASH_DTYPES and c.key_dim <= FLASH_SIZE
        for name in ("xla", "cudnn") if flash else ("xla",):
            functions[f"attention: {name}"] = partial(
                jax.nn.dot_product_attention, scale=scale, is_causal=True, implementation=name
            )
    needed = tokens * sequence * heads * (c.key_dim + c.value_dim) / 2
    return {
        name: Operator(function, (query, key, value), (), needed, 2 * needed) for name, function in functions.items()
    }


def loss_operators(c: ModelConfig, tokens: int, dtype: str) -> dict[str, Operator]:
    """Returns the loss together with the head."""
    features, head = arrays(dtype, (tokens, c.hidden_size), (c.vocab_size, c.hidden_size))
    targets = jax.random.randint(jax.random.PRNGKey(0), (tokens,), 0, c.vocab_size)
    needed = 1.0 * tokens * c.hidden_size * c.vocab_size
    fixed = head, targets, jnp.ones(tokens, bool)
    return {"cross-entropy (in use)": Operator(token_cross_entropy, (features,), fixed, needed, needed)}


def time_operator(operator: Operator, dtype: str) -> dict:
    """Returns the matmul rate, and time, rate and share of each pass."""

    def with_gradient(active, fixed):
        y, pull_back = jax.vjp(lambda *active: operator.function(*active, *fixed), *active)
        return y, pull_back(y)

    def forward(active, fixed):
        return operator.function(*active, *fixed)

    rate = matmul_rate(dtype)
    result = {"matmul_gflops": round(rate / 1e9, 1)}
    needed = operator.forward, operator.forward + operator.backward
    for name, function, multiply_adds in zip(PASSES, (forward, with_gradient), needed, strict=True):
        with operator.context():
            taken = seconds(jax.jit(function), operator.active, operator.fixed)
        achieved = 2 * multiply_adds / taken
        result[name] = {
            "ms": round(1e3 * taken, 3),
            "gflops": round(achieved / 1e9, 1),
            "share": round(achieved / rate, 3),
        }
    return result


def main(arguments: list[str] | None = None) -> dict:
    """Measures all operators and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = Path(__file__).parent / "shapes"
    parser.add_argument("model", type=Path, nargs="?", default=shapes / "small.json", help="a config.json")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--sequence-length", type=int, default=512, help="must divide --tokens")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    config, tokens, dtype = read_model_config(options.model), options.tokens, options.dtype
    if tokens % options.sequence_length:
        parser.error(f"--sequence-length {options.sequence_length} must divide --tokens {tokens}")
    measured = {}
    for operators in (
        partial(expert_operators, config, tokens, dtype),
        partial(attention_operators, config, tokens, options.sequence_length, dtype),
        partial(loss_operators, config, tokens, dtype),
    ):  # one kind at a time, so that only its arrays are in memory
        measured |= {name: time_operator(operator, dtype) for name, operator in operators().items()}
    result = {"model": options.model.stem, "dtype": dtype, "tokens": tokens, "sequence_length": options.sequence_length}
    result |= {"operators": measured, "device": device()}
    if options.plot:
        shares = {f"{name}, {kind}": row[kind]["share"] for name, row in measured.items() for kind in PASSES}
        title = f"{options.model.stem}, {tokens:,} tokens in {dtype}: {device()}"
        draw_bars(options.plot, title, "share of the matmul rate", shares)
    return emit(result)


if __name__ == "__main__":
    main()
