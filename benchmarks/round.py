r"""Measures one federated round with random weights: tokens per second, share of the matmul rate, and memory.

    python benchmarks/round.py benchmarks/shapes/small.json --config.clients=4 --config.batch_size=4 \
        --config.sequence_length=128 --config.local_steps=2 --config.model.remat=False

The setting comes from --config (configs/dolly_pathological.py) and from further arguments (--config.KEY=VALUE: clients,
batch_size, sequence_length, local_steps, model.dtype, model.quantisation, model.remat, lora.*, slot.*, mesh.*), for one
method (--method flex). The second half of every sequence is the response. Times are the median of --rounds rounds,
after a first one. Prints one JSON line; with --plot, draws the time of the round and the least possible time.

`round_gb` is the memory of the compiled program: backbone, state, batches and temporary arrays. `peak_gb` is that of
the process. `utilisation` is the least possible time over the measured time. The least possible time (`floor_s`) is
that of the floating-point operations that a round needs at least (`floor_gflop`, see benchmarks/README.md) at the
matmul rate (`matmul_gflops`), which is measured in the same process. Recomputation does not count.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
from measure import device, draw_bars, emit, matmul_rate, multiply_adds, peak_bytes, random_params

from flex_jax.building import (
    Backbone,
    PreparedMethod,
    ResolvedMethod,
    build_mesh,
    prepare_method,
    resolve_method,
    start_without_grafting,
)
from flex_jax.data.batches import Batch
from flex_jax.federated.client import OptimizerSettings
from flex_jax.federated.compression import tree_bytes
from flex_jax.federated.federated_round import RoundFunction, make_round
from flex_jax.federated.state import RoundInputs
from flex_jax.main import load, override
from flex_jax.models.checkpoint import empty_params, read_model_config
from flex_jax.models.decoder import Decoder


def backbone_shapes(config, shape_file: Path) -> Backbone:
    """Returns the model of a config.json with the settings of config.model, and shapes instead of weights."""
    shape = read_model_config(shape_file)
    quantisation = None if config.model.quantisation == "none" else config.model.quantisation
    shapes = jax.eval_shape(partial(empty_params, shape, dtype=config.model.dtype, quantisation=quantisation))
    return Backbone(Decoder(shape, remat=config.model.remat), shapes, None, build_mesh(config))


def random_backbone(config, shape_file: Path) -> Backbone:
    """Returns the model of a config.json with random weights."""
    backbone = backbone_shapes(config, shape_file)
    return backbone._replace(params=random_params(backbone.params))


def random_batches(config, vocabulary: int) -> Batch:
    """Returns random tokens [C, steps, B, S]; the second half of each sequence is the response."""
    grid = (config.clients, config.local_steps, config.batch_size, config.sequence_length)
    tokens = np.random.default_rng(0).integers(0, vocabulary, grid).astype(np.int32)
    response = np.arange(config.sequence_length) >= config.sequence_length // 2
    return Batch(tokens, np.broadcast_to(response, grid).astype(np.float32))


def round_function(prepared: PreparedMethod, backbone: Backbone) -> RoundFunction:
    """Returns the round of a method before it is compiled."""
    config = prepared.config
    optimizer = OptimizerSettings(config.rounds, **config.optimizer)
    return make_round(prepared.spec, num_clients=config.clients, optimizer=optimizer, mesh=backbone.mesh)


def time_rounds(prepared: PreparedMethod, backbone: Backbone, rounds: int) -> dict:
    """Returns the seconds of compilation and of a round, the tokens per second, and the memory of the round."""
    config = prepared.config
    frozen, state, init_clients = start_without_grafting(config, prepared.spec, backbone, jax.random.PRNGKey(0))
    batches = random_batches(config, backbone.model.config.vocab_size)
    cohort = np.arange(config.clients, dtype=np.int32)
    state, num_examples = state._replace(clients=init_clients(cohort)), np.ones(config.clients, np.float32)
    inputs = RoundInputs(frozen, state, batches, cohort, num_examples)
    started = time.perf_counter()
    compiled = round_function(prepared, backbone).lower(*inputs).compile()
    compile_seconds, seconds = time.perf_counter() - started, []
    for _ in range(1 + rounds):
        started = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(*inputs))
        seconds.append(time.perf_counter() - started)
        inputs = inputs._replace(state=state)
    median, memory = float(np.median(seconds[1:])), compiled.memory_analysis()
    return {
        "clients x steps x batch x sequence": " x ".join(map(str, batches.tokens.shape)),
        "compile_s": round(compile_seconds, 2),
        "round_s": round(median, 4),
        "tokens_per_s": round(batches.tokens.size / median, 1),
        "round_gb": round((memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9, 4),
        "loss_is_finite": bool(np.isfinite(metrics["clients"]["train_loss"]).all()),
    }


def read_setting(known: argparse.Namespace, changes: list[str]) -> ResolvedMethod:
    """Returns the method that the command line asks for, with its config."""
    config = load(known.config)
    override(config, changes)
    return resolve_method(config, known.method)


def main(arguments: list[str] | None = None) -> dict:
    """Measures a round and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a config.json")
    parser.add_argument("--config", default="configs/dolly_pathological.py")
    parser.add_argument("--method", default="flex")
    parser.add_argument("--rounds", type=int, default=3, help="number of timed rounds")
    parser.add_argument("--plot", type=Path)
    known, changes = parser.parse_known_args(arguments)
    resolved = read_setting(known, changes)
    config = resolved.config
    backbone = random_backbone(config, known.model)
    prepared = prepare_method(resolved, backbone)
    result = {"model": known.model.stem, "method": known.method, "dtype": config.model.dtype}
    result |= {"quantisation": config.model.quantisation, "remat": config.model.remat}
    result |= time_rounds(prepared, backbone, known.rounds)
    result |= {
        "backbone_gb": round(tree_bytes(backbone.params) / 1e9, 3),
        "planned_peak_gb": round(prepared.plan.peak_bytes / 1e9, 3),
        "peak_gb": round(peak_bytes() / 1e9, 3),
    }
    if not backbone.model.config.kv_lora_rank and known.method == "flex" and config.slot.training == "full":
        tokens = config.clients * config.local_steps * config.batch_size * config.sequence_length
        needed = multiply_adds(backbone.model.config, prepared.spec.model.adapters, config.sequence_length)
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
