"""One federated round with random weights: tokens a second, use of the device's matmul rate, memory beside the plan's.

    python benchmarks/round.py benchmarks/shapes/small.json --config.clients=4 --config.batch_size=4 \\
        --config.sequence_length=128 --config.local_steps=2 --config.model.remat=False

The setting is that of --config (configs/dolly_pathological.py) and of further arguments (--config.KEY=VALUE: clients,
batch_size, sequence_length, local_steps, model.dtype, model.quantisation, model.remat, lora.*, slot.*, mesh.*), for one
method (--method flex); the second half of every sequence is its response. The median of
--rounds after a first one is told. Prints one JSON line; with --plot, draws how far the round is from its floor.
`round_gb` is what the compiled program holds (backbone, state, batches and its scratch); `peak_gb` is of the process.

`utilisation` is what of the matmul rate measured in the same process (`matmul_gflops`) goes into the floating-point
operations that a round cannot do without (`floor_gflop`, see benchmarks/README.md); recomputation does not count.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
from measure import device, draw_bars, emit, matmul_rate, multiply_adds, peak_bytes, random_params

from flex_jax.config import for_method, validate
from flex_jax.data.batches import Batch
from flex_jax.federated.compression import tree_bytes
from flex_jax.main import load, override
from flex_jax.models.checkpoint import empty_params, read_model_config
from flex_jax.models.decoder import Decoder
from flex_jax.simulation import Backbone, any_run, build_round, describe


def backbone_shapes(config, shape_file: Path) -> Backbone:
    """The model in a config.json, as config.model asks for, with shapes in the place of weights."""
    shape = read_model_config(shape_file)
    quantisation = None if config.model.quantisation == "none" else config.model.quantisation
    shapes = jax.eval_shape(partial(empty_params, shape, dtype=config.model.dtype, quantisation=quantisation))
    return Backbone(Decoder(shape, remat=config.model.remat), shapes, None)


def random_backbone(config, shape_file: Path) -> Backbone:
    """The same with random weights."""
    backbone = backbone_shapes(config, shape_file)
    return backbone._replace(params=random_params(backbone.params))


def random_batches(config, vocabulary: int) -> Batch:
    """Tokens [C, steps, B, S], the second half of each sequence its response."""
    grid = (config.clients, config.local_steps, config.batch_size, config.sequence_length)
    tokens = np.random.default_rng(0).integers(0, vocabulary, grid).astype(np.int32)
    response = np.arange(config.sequence_length) >= config.sequence_length // 2
    return Batch(tokens, np.broadcast_to(response, grid).astype(np.float32))


def time_rounds(config, backbone: Backbone, rounds: int) -> dict:
    """Seconds to compile and of a round, tokens a second, the bytes that the compiled round holds at its peak."""
    run = any_run(config, backbone, jax.random.PRNGKey(0))
    frozen, state, fresh = run.start
    round_fn = build_round(config, run)
    batches = random_batches(config, backbone.model.config.vocab_size)
    cohort = np.arange(config.clients, dtype=np.int32)
    state, examples = state._replace(clients=fresh(cohort)), np.ones(config.clients, np.float32)
    started = time.perf_counter()
    compiled = round_fn.lower(frozen, state, batches, cohort, examples).compile()
    compile_seconds, seconds = time.perf_counter() - started, []
    for _ in range(1 + rounds):
        started = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(frozen, state, batches, cohort, examples))
        seconds.append(time.perf_counter() - started)
    median, memory = float(np.median(seconds[1:])), compiled.memory_analysis()
    return {
        "clients x steps x batch x sequence": " x ".join(map(str, batches.tokens.shape)),
        "compile_s": round(compile_seconds, 2),
        "round_s": round(median, 4),
        "tokens_per_s": round(batches.tokens.size / median, 1),
        "round_gb": round((memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9, 4),
        "loss_is_finite": bool(np.isfinite(metrics["clients"]["train_loss"]).all()),
    }


def read_setting(known: argparse.Namespace, changes: list[str]):
    """The config of the one method."""
    config = load(known.config)
    override(config, changes)
    validate(config)
    return for_method(config, known.method)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a config.json")
    parser.add_argument("--config", default="configs/dolly_pathological.py")
    parser.add_argument("--method", default="flex")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that are timed")
    parser.add_argument("--plot", type=Path)
    known, changes = parser.parse_known_args(arguments)
    config = read_setting(known, changes)
    backbone = random_backbone(config, known.model)
    planned = describe(config, backbone, known.method)
    result = {"model": known.model.stem, "method": known.method, "dtype": config.model.dtype}
    result |= {"quantisation": config.model.quantisation, "remat": config.model.remat}
    result |= time_rounds(config, backbone, known.rounds)
    result |= {
        "backbone_gb": round(tree_bytes(backbone.params) / 1e9, 3),
        "planned_peak_gb": round(planned["peak_bytes"] / 1e9, 3),
        "peak_gb": round(peak_bytes() / 1e9, 3),
    }
    if not backbone.model.config.latent_rank and known.method == "flex" and config.slot.training == "full":
        tokens = config.clients * config.local_steps * config.batch_size * config.sequence_length
        adapters = any_run(config, backbone, jax.random.PRNGKey(0)).recipe.model.adapters
        needed = multiply_adds(backbone.model.config, adapters, config.sequence_length)
        floor = 2 * tokens * (needed["forward"] + needed["backward"])
        rate = matmul_rate(config.model.dtype)
        result |= {
            "floor_gflop": round(floor / 1e9, 1),
            "matmul_gflops": round(rate / 1e9, 1),
            "floor_s": round(floor / rate, 4),
            "utilisation": round(floor / rate / result["round_s"], 3),
        }
    result["device"] = device()
    if known.plot:
        values = {name: result[key] for name, key in (("this round", "round_s"), ("floor", "floor_s")) if key in result}
        draw_bars(known.plot, f"{known.model.stem}: {result['tokens_per_s']:,.0f} tokens/s", "seconds", values)
    return emit(result)


if __name__ == "__main__":
    main()
