"""One federated round on a real shape with random weights: tokens a second and peak memory, beside the plan's.

    python benchmarks/round.py benchmarks/shapes/Qwen1.5-MoE-A2.7B.json --config.model.dtype=bfloat16 \\
        --config.model.quantisation=int4 --config.slot.training=lora --config.batch_size=1 \\
        --config.sequence_length=64 --config.local_steps=1

The setting is that of --config (configs/dolly_pathological.py) and of further arguments (--config.KEY=VALUE), for one
method (--method flex); the second half of every sequence is its response. The first round compiles; the median of the
--rounds after it is told. Prints one JSON line. `peak_gb` is what the device reports, or on CPU the largest resident
memory of the process.
"""

import argparse
import json
import resource
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flex_jax.config import for_method
from flex_jax.data.batches import Batch
from flex_jax.federated.compression import tree_bytes
from flex_jax.federated.round import make_round
from flex_jax.main import load, override
from flex_jax.models.checkpoint import empty_params, read_model_config
from flex_jax.models.decoder import Decoder
from flex_jax.simulation import Backbone, any_run, describe


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
        return ((places >> 13).astype(jnp.uint8).astype(jnp.float32) / 6400.0).astype(dtype)

    return jax.tree.map(lambda held: leaf(held.shape, held.dtype), shapes)


def peak_bytes() -> int:
    """The most memory used so far."""
    reported = jax.devices()[0].memory_stats()
    return reported["peak_bytes_in_use"] if reported else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a config.json")
    parser.add_argument("--config", default="configs/dolly_pathological.py")
    parser.add_argument("--method", default="flex")
    parser.add_argument("--rounds", type=int, default=1, help="rounds that are timed")
    known, changes = parser.parse_known_args(arguments)
    config = load(known.config)
    override(config, changes)
    config = for_method(config, known.method)
    shape = read_model_config(known.model)
    quantisation = None if config.model.quantisation == "none" else config.model.quantisation
    params = random_params(
        jax.eval_shape(partial(empty_params, shape, dtype=config.model.dtype, quantisation=quantisation))
    )
    model = Decoder(shape, remat=config.model.remat)
    backbone = Backbone(model, params, None)
    planned = describe(config, backbone, known.method)
    recipe, (frozen, state, fresh) = any_run(config, backbone, jax.random.PRNGKey(0))
    state = state._replace(clients=fresh(np.arange(config.clients)))
    round_fn = make_round(
        recipe,
        clients=config.clients,
        rounds=config.rounds,
        learning_rate=config.optimizer.learning_rate,
        final_learning_rate=config.optimizer.final_learning_rate,
        weight_decay=config.optimizer.weight_decay,
        clip_norm=config.optimizer.clip_norm,
    )
    grid = (config.clients, config.local_steps, config.batch_size, config.sequence_length)
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, grid).astype(np.int32)
    response = np.arange(config.sequence_length) >= config.sequence_length // 2
    batches = Batch(tokens, np.broadcast_to(response, grid).astype(np.float32))
    cohort, examples = np.arange(config.clients, dtype=np.int32), np.ones(config.clients, np.float32)
    seconds = []
    for _ in range(1 + known.rounds):
        started = time.perf_counter()
        state, metrics = jax.block_until_ready(round_fn(frozen, state, batches, cohort, examples))
        seconds.append(time.perf_counter() - started)
    first, *timed = seconds
    round_seconds = float(np.median(timed))
    result = {
        "model": known.model.stem,
        "dtype": config.model.dtype,
        "quantisation": config.model.quantisation,
        "clients x steps x batch x sequence": " x ".join(map(str, grid)),
        "backbone_gb": round(tree_bytes(params) / 1e9, 3),
        "planned_peak_gb": round(planned["peak_bytes"] / 1e9, 3),
        "peak_gb": round(peak_bytes() / 1e9, 3),
        "first_round_s": round(first, 1),
        "round_s": round(round_seconds, 4),
        "tokens_per_s": round(tokens.size / round_seconds, 1),
        "loss_is_finite": bool(np.isfinite(metrics["clients"]["train_loss"]).all()),
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
