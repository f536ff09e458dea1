"""What the benchmarks have in common: timing, the JSON line, the picture, random weights, arithmetic of a round."""

import json
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp

from flex_jax.models.config import AdapterConfig, ModelConfig


def seconds(function: Callable, *arguments, repeats: int = 10) -> float:
    """Median seconds of a call whose result is waited for, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - started)
    return median(times)


def device() -> str:
    return f"{jax.devices()[0].device_kind} ({jax.default_backend()})"


def emit(result: dict) -> dict:
    """Prints the result as one JSON line."""
    print(json.dumps(result), flush=True)
    return result


def peak_bytes() -> int:
    """The most memory used so far: what the device reports, or on CPU the largest resident memory of the process."""
    reported = jax.devices()[0].memory_stats()
    return reported["peak_bytes_in_use"] if reported else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def matmul_rate(dtype: str) -> float:
    """Floating-point operations a second of a large square matmul, accumulated in float32: what the device can do."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    keys = jax.random.split(jax.random.PRNGKey(0))
    a, b = (jax.random.normal(key, (size, size), jnp.dtype(dtype)) for key in keys)
    product = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))
    return 2 * size**3 / seconds(product, a, b, repeats=20)


def random_params(shapes: dict) -> dict:
    """Weights that look random, made without temporaries larger than themselves."""

    @partial(jax.jit, static_argnums=(0, 1))
    def leaf(shape, dtype):
        places = sum(
            jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(2654435761 + 2 * axis * 40503)
            for axis in range(len(shape))
        )
        if jnp.issubdtype(dtype, jnp.integer):
            return (places >> 13).astype(dtype)
        return (((places >> 13).astype(jnp.uint8).astype(jnp.float32) - 127.5) / 3200.0).astype(dtype)

    return jax.tree.map(lambda held: leaf(held.shape, held.dtype), shapes)


def multiply_adds(
    config: ModelConfig, adapters: AdapterConfig, sequence: int, response: float = 0.5
) -> dict[str, float]:
    """Multiply-adds a token that a training step cannot do without, for FLEx with a slot trained in full.

    "forward": through the layers, head at the `response` share of positions alone. "backward": to the activations,
    with weight gradients of LoRA and slot only. "remat": the forward pass of the layers that rematerialisation repeats.
    Causal attention counts the half of the scores that is seen. For grouped-query attention.
    """
    c, rank = config, adapters.lora.rank
    attended = c.heads * c.head_dim
    keys = c.kv_heads * c.head_dim
    frozen = c.width * (2 * attended + 2 * keys)
    frozen += 3 * c.width * (c.experts_per_token * c.expert_width + c.shared_expert_width) + c.width * c.experts
    scores = sequence * attended  # queries by keys and shares by values, half of each
    trained = rank * (3 * c.width + attended + 2 * keys) + 3 * c.width * c.expert_width * adapters.slot.experts
    layer, head = frozen + scores + trained, response * c.vocab_size * c.width
    return {
        "forward": c.layers * layer + head,
        "backward": c.layers * (frozen + 2 * scores + 2 * trained) + head,
        "remat": c.layers * layer,
    }


def draw_bars(path: Path, title: str, unit: str, values: dict[str, float]) -> None:
    """A bar for each name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.8 + 0.4 * len(values)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(values), list(values.values()))
    axes.bar_label(bars, fmt="{:,.4g}", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set(title=title, xlabel=unit)
    figure.savefig(path, dpi=120)
