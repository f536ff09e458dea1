"""Writes docs/methods.md: the hyperparameters of every method, what it sends and stores, and how many bytes that is.

    python tools/methods.py > docs/methods.md

It uses shapes only: no weights and no accelerator. Bytes are those of one client in one round, in float32, on the shape
of Qwen1.5-MoE-A2.7B with the settings of configs/methods/.
"""

import ast
import inspect
import re
import sys
from functools import partial
from pathlib import Path

import jax
from flax.traverse_util import flatten_dict

from flex_jax.building import Backbone, abstract_state, prepare_method, resolve_method
from flex_jax.federated.client import exchanged
from flex_jax.main import load
from flex_jax.methods import METHODS
from flex_jax.models.checkpoint import empty_params, read_model_config
from flex_jax.models.decoder import Decoder
from flex_jax.reporting.tables import human_bytes, human_count

ROOT = Path(__file__).parents[1]
SHAPE = ROOT / "benchmarks/shapes/Qwen1.5-MoE-A2.7B.json"
COLUMNS = ("method", "what it is", "paper", "hyperparameters", "shared adapters", "also sent", "personal adapters",
           "also stored", "upload", "download", "shared parameters", "personal parameters")  # fmt: skip
HEAD = """# The methods

Generated from the code: `python tools/methods.py > docs/methods.md`. Hyperparameters have their defaults; set them with
`--config.hparams.METHOD.NAME=VALUE`. *Shared* adapters are trained and sent. *Personal* adapters are trained and never
leave their client. The frozen backbone is on every client and is never sent. Bytes and parameters are those of one
client in one round, on the shape of Qwen1.5-MoE-A2.7B with the settings of `configs/methods/`. If clients have
different LoRA ranks, they are those of the highest rank.
"""


def leaf_names(tree: dict, skipped: set[str]) -> str:
    """Returns the leaves of a tree of adapters by their place, without the names of layers and projections."""
    places = {}
    for *place, leaf in flatten_dict(tree):
        places.setdefault(" ".join(part for part in place if part not in skipped), {})[leaf] = None
    return "; ".join(f"{place}: {', '.join(leaves)}".removeprefix(": ") for place, leaves in places.items())


def row(name: str, backbone: Backbone) -> tuple[str, ...]:
    """Returns the cells of one method."""
    prepared = prepare_method(resolve_method(load(str(ROOT / f"configs/methods/{name}.py")), name), backbone)
    _, state = abstract_state(prepared.config, prepared.spec, backbone)
    client = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state.clients)
    upload, download = exchanged(prepared.spec, state.server, client)
    model, planned = backbone.model.config, prepared.plan
    skipped = {*model.layer_stacks(), *model.lora_projections(), "moe", "gate_proj", "up_proj", "down_proj"}
    return (
        f"`{name}`",
        *description(name),
        hyperparameters(name),
        leaf_names(state.server.shared, skipped) or "none",
        ", ".join({**upload.extra, **download.extra}),
        leaf_names(client.personal, skipped) or "none",
        ", ".join(client.extra),
        human_bytes(planned.upload_bytes),
        human_bytes(planned.download_bytes),
        human_count(planned.trained_per_client - planned.personal_per_client),
        human_count(planned.personal_per_client),
    )


def description(name: str) -> tuple[str, str]:
    """Returns the first line of the docstring of a method's config, and a link to the paper."""
    text = ast.get_docstring(ast.parse((ROOT / f"configs/methods/{name}.py").read_text(encoding="utf-8")))
    line = re.sub(r" \([^()]*arXiv[^()]*\)", "", text.partition("\n")[0].rstrip("."))
    number = re.search(r"arXiv\s+(\d+\.\d+)", text)
    return line, f"[{number[1]}](https://arxiv.org/abs/{number[1]})" if number else ""


def hyperparameters(name: str) -> str:
    """Returns the arguments of a method's factory with their defaults."""
    return ", ".join(
        f"`{argument.name}={argument.default!r}`" for argument in inspect.signature(METHODS[name]).parameters.values()
    )


def table() -> str:
    """Returns the text of docs/methods.md."""
    model = read_model_config(SHAPE)
    shapes = jax.eval_shape(partial(empty_params, model, dtype="bfloat16", quantisation=None))
    backbone = Backbone(Decoder(model), shapes, None)
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(row(name, backbone) for name in METHODS)]
    return HEAD + "\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
