r"""Prints what a run on a real checkpoint will store and send, from its config.json alone.

    python tools/plan.py benchmarks/shapes/Qwen1.5-MoE-A2.7B.json --config configs/dolly_pathological.py \
        --config.model.dtype=bfloat16 --config.model.quantisation=int4 --config.slot.training=lora

It needs no weights and no accelerator. It prints the bytes of each part of the frozen backbone, then the plan of every
method of the config as a run prints it, and at the end one JSON line. Further arguments (--config.KEY=VALUE) change the
config, as for a run.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import jax
from flax.traverse_util import flatten_dict

from flex_jax.building import Backbone, plan_row, prepare_method, resolve_method
from flex_jax.config import validate
from flex_jax.errors import InputError
from flex_jax.federated.compression import tree_bytes
from flex_jax.federated.cost_model import count
from flex_jax.main import load, override
from flex_jax.models.checkpoint import empty_params, read_model_config
from flex_jax.models.decoder import Decoder
from flex_jax.reporting.tables import human_count, plan_table


def backbone_parts(params: dict) -> list[tuple[str, int, int]]:
    """Returns (name, parameters, bytes) of each kind of matrix over all layers, largest first."""
    parts = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        name = path.removesuffix("/kernel").removesuffix("/scale")
        parts[name] = (count(leaf), tree_bytes(leaf))
    return sorted(((name, *sizes) for name, sizes in parts.items()), key=lambda part: -part[2])


def main(arguments: list[str] | None = None) -> dict:
    """Prints the plan, and returns the totals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the config.json of a checkpoint")
    parser.add_argument("--config", default="configs/dolly_pathological.py", help="a config file of a run")
    known, changes = parser.parse_known_args(arguments)
    config = load(known.config)
    override(config, changes)
    validate(config)
    model = read_model_config(known.model)
    quantisation = None if config.model.quantisation == "none" else config.model.quantisation
    shapes = jax.eval_shape(partial(empty_params, model, dtype=config.model.dtype, quantisation=quantisation))
    for name, parameters, size in backbone_parts(shapes):
        bits = 8 * size / parameters
        print(f"{name:42} {human_count(parameters):>8} x {bits:6.3f} bit = {size / 1e9:8.4f} GB")
    total = {"parameters": count(shapes), "backbone_gb": round(tree_bytes(shapes) / 1e9, 3)}
    print(f"{'backbone':42} {human_count(total['parameters']):>8} {'':12} = {total['backbone_gb']:8.4f} GB\n")
    backbone = Backbone(Decoder(model, remat=config.model.remat), shapes, None)
    prepared = [prepare_method(resolve_method(config, name), backbone) for name in config.methods]
    print(plan_table([plan_row(prepared) for prepared in prepared]))
    total |= {"peak_gb": {prepared.name: round(prepared.plan.peak_bytes / 1e9, 3) for prepared in prepared}}
    print(json.dumps({"model": known.model.stem, "quantisation": config.model.quantisation} | total))
    return total


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
