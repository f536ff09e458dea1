"""What a run on a real checkpoint will hold and send, from its config.json alone: no weights, no device.

    python benchmarks/plan.py benchmarks/shapes/Qwen1.5-MoE-A2.7B.json --config configs/dolly_pathological.py \\
        --config.model.dtype=bfloat16 --config.model.quantisation=int4 --config.slot.training=lora

Prints the bytes of the frozen backbone part by part, then the plan of every method of the config, as a run prints it.
Further arguments (--config.KEY=VALUE) change the config, as on the command line of a run. One JSON line ends it.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import jax
from flax.traverse_util import flatten_dict

from flex_jax.config import validate
from flex_jax.errors import InputError
from flex_jax.federated.compression import tree_bytes
from flex_jax.federated.plan import count
from flex_jax.main import load, override
from flex_jax.models.checkpoint import empty_params, read_model_config
from flex_jax.models.decoder import Decoder
from flex_jax.reporting.tables import human_count, plan_table
from flex_jax.simulation import Backbone, describe


def parts(params: dict) -> list[tuple[str, int, int]]:
    """(name, parameters, bytes) of each kind of matrix, largest first; all layers together."""
    rows = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        name = path.removesuffix("/kernel").removesuffix("/scale")
        rows[name] = (count(leaf), tree_bytes(leaf))
    return sorted(((name, *numbers) for name, numbers in rows.items()), key=lambda row: -row[2])


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a config.json")
    parser.add_argument("--config", default="configs/dolly_pathological.py")
    known, changes = parser.parse_known_args(arguments)
    config = load(known.config)
    override(config, changes)
    validate(config)
    model = read_model_config(known.model)
    quantisation = None if config.model.quantisation == "none" else config.model.quantisation
    shapes = jax.eval_shape(partial(empty_params, model, dtype=config.model.dtype, quantisation=quantisation))
    for name, parameters, held in parts(shapes):
        bits = 8 * held / parameters
        print(f"{name:42} {human_count(parameters):>8} x {bits:6.3f} bit = {held / 1e9:8.4f} GB")
    total = {"parameters": count(shapes), "backbone_gb": round(tree_bytes(shapes) / 1e9, 3)}
    print(f"{'backbone':42} {human_count(total['parameters']):>8} {'':12} = {total['backbone_gb']:8.4f} GB\n")
    backbone = Backbone(Decoder(model, remat=config.model.remat), shapes, None)
    plans = [describe(config, backbone, name) for name in config.methods]
    print(plan_table(plans))
    total |= {"peak_gb": {plan["method"]: round(plan["peak_bytes"] / 1e9, 3) for plan in plans}}
    print(json.dumps({"model": known.model.stem, "quantisation": config.model.quantisation} | total))
    return total


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
