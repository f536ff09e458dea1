"""Helpers of the benchmarks: timing, JSON lines, pictures, random weights, and the arithmetic of a round."""

import json
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp

from flex_jax.models.adapters import AdapterConfig
from flex_jax.models.config import ModelConfig


def seconds(function: Callable, *arguments, repeats: int = 10) -> float:
    """Returns the median seconds of a call and its result, after a first call that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - started)
    return median(times)


def device() -> str:
    """Returns the name of the device and its backend."""
    return f"{jax.devices()[0].device_kind} ({jax.default_backend()})"


def emit(result: dict) -> dict:
    """Prints the result as one JSON line and returns it."""
    print(json.dumps(result), flush=True)
    return result


def peak_bytes() -> int:
    """Returns the peak memory so far: as the device reports it, or on CPU the peak resident memory of the process."""
    reported = jax.devices()[0].memory_stats()
    return reported["peak_bytes_in_use"] if reported else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def matmul_rate(dtype: str) -> float:
    """Returns the floating-point operations per second of a large square matmul, accumulated in float32."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    keys = jax.random.split(jax.random.PRNGKey(0))
    a, b = (jax.random.normal(key, (size, size), jnp.dtype(dtype)) for key in keys)
    product = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))
    return 2 * size**3 / seconds(product, a, b, repeats=20)


def random_params(shapes: dict) -> dict:
    """Returns arrays of pseudo-random values for these shapes; no temporary array is larger than its result."""

    @partial(jax.jit, static_argnums=(0, 1))
    def leaf(shape, dtype):
        places = sum(
            jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(2654435761 + 2 * axis * 40503)
            for axis in range(len(shape))
        )
        if jnp.issubdtype(dtype, jnp.integer):
            return (places >> 13).astype(dtype)
        return (((places >> 13).astype(jnp.uint8).astype(jnp.float32) - 127.5) / 3200.0).astype(dtype)

    return jax.tree.map(lambda shape: leaf(shape.shape, shape.dtype), shapes)


def multiply_adds(
    config: ModelConfig, adapters: AdapterConfig, sequence: int, response: float = 0.5
) -> dict[str, float]:
    """Returns the multiply-adds per token that a training step needs at least, for FLEx with a fully trained slot.

    It assumes grouped-query attention. Causal attention counts half of the scores, because the other half is masked.

    Args:
        config: the shape of the model.
        adapters: the adapters that are trained.
        sequence: S, tokens of a sequence.
        response: the share of positions with a target; only these need the head.

    Returns:
        "forward": the layers, and the head at target positions. "backward": gradients of activations, and weight
        gradients of LoRA and slot only. "remat": the forward pass of the layers, which rematerialisation repeats.
    """
    c, rank = config, adapters.lora.rank
    attended = c.num_heads * c.head_dim
    keys = c.num_kv_heads * c.head_dim
    active = c.num_experts_per_tok * c.moe_intermediate_size + c.shared_expert_intermediate_size
    frozen = c.hidden_size * (2 * attended + 2 * keys + 3 * active + c.num_experts)
    scores = sequence * attended  # queries times keys and weights times values, half of each
    slot = 3 * c.hidden_size * c.moe_intermediate_size * adapters.slot.num_experts
    trained = rank * (3 * c.hidden_size + attended + 2 * keys) + slot
    layer, head = frozen + scores + trained, response * c.vocab_size * c.hidden_size
    return {
        "forward": c.num_layers * layer + head,
        "backward": c.num_layers * (frozen + 2 * scores + 2 * trained) + head,
        "remat": c.num_layers * layer,
    }


def draw_bars(path: Path, title: str, unit: str, values: dict[str, float]) -> None:
    """Draws a bar for each name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.8 + 0.4 * len(values)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(values), list(values.values()))
    axes.bar_label(bars, fmt="{:,.4g}", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set(title=title, xlabel=unit)
    figure.savefig(path, dpi=120)
