"""What every method sends and keeps, and how many bytes that is: docs/methods.md, made from the code.

    python benchmarks/methods.py > docs/methods.md

Shapes alone: no weights, no device. Bytes are those of one client in one round, float32, on the shape of
Qwen1.5-MoE-A2.7B with the numbers of configs/methods/.
"""

import ast
import re
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from flex_jax.config import for_method
from flex_jax.federated.client import exchanged
from flex_jax.federated.plan import plan
from flex_jax.main import load
from flex_jax.methods import METHODS
from flex_jax.models.checkpoint import empty_params, read_model_config
from flex_jax.models.decoder import Decoder
from flex_jax.reporting.tables import human_bytes, human_count
from flex_jax.simulation import Backbone, any_run

ROOT = Path(__file__).parents[1]
SHAPE = ROOT / "benchmarks/shapes/Qwen1.5-MoE-A2.7B.json"
COLUMNS = ("method", "what it is", "paper", "trained and sent", "sent beside it", "trained and kept", "kept beside it",
           "up", "down", "parameters sent", "parameters kept")  # fmt: skip
HEAD = """# The methods

Made from the code: `python benchmarks/methods.py > docs/methods.md`. Bytes and parameters are those of one client in
one round, on the shape of Qwen1.5-MoE-A2.7B with the numbers of `configs/methods/`; where clients have ranks of their
own, those of the highest. What is *kept* never leaves a client; the frozen backbone is on every client and never sent.
"""


def names(tree: dict) -> str:
    """The leaves of a tree of adapters in words: where they are and what, without layers and projections."""
    places = {}
    for path in flatten_dict(tree):
        words = [
            part for part in path[:-1] if part in ("global", "own", "lower", "upper", "weight", "attention", "slot")
        ]
        places.setdefault(" ".join(words), {})[path[-1]] = None
    return "; ".join(
        f"{place}: {', '.join(leaves)}" if place else ", ".join(leaves) for place, leaves in places.items()
    )


def row(name: str, backbone: Backbone) -> tuple[str, ...]:
    """The cells of one method."""
    config = for_method(load(str(ROOT / f"configs/methods/{name}.py")), name)

    def shapes(params):
        recipe, begun = any_run(config, backbone._replace(params=params), jax.random.PRNGKey(0))
        recipes.append(recipe)
        return begun.frozen, begun.state._replace(clients=begun.clients(np.arange(1)))

    recipes = []
    frozen, state = jax.eval_shape(shapes, backbone.params)
    recipe = recipes[0]
    client = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state.clients)
    upload, download = exchanged(recipe, state.server, client)
    planned = plan(
        recipe, frozen, state, cohort=config.clients, batch=config.batch_size, sequence=config.sequence_length
    )
    beside = {**{key: None for key in upload if key != "delta"}, **{key: None for key in download if key != "shared"}}
    return (
        f"`{name}`",
        *described(name),
        names(state.server.shared) or "nothing",
        ", ".join(beside),
        names(client.personal),
        ", ".join(client.kept),
        human_bytes(planned.upload_bytes),
        human_bytes(planned.download_bytes),
        human_count(planned.trained_per_client - planned.personal_per_client),
        human_count(planned.personal_per_client),
    )


def described(name: str) -> tuple[str, str]:
    """(what the first line of a method's config says it is, the paper's number)."""
    text = ast.get_docstring(ast.parse((ROOT / f"configs/methods/{name}.py").read_text(encoding="utf-8")))
    line = re.sub(r" \([^()]*arXiv[^()]*\)", "", text.partition("\n")[0].rstrip("."))
    number = re.search(r"arXiv\s+(\d+\.\d+)", text)
    return line, f"[{number[1]}](https://arxiv.org/abs/{number[1]})" if number else ""


def table() -> str:
    """docs/methods.md."""
    model = read_model_config(SHAPE)
    shapes = jax.eval_shape(partial(empty_params, model, dtype="bfloat16", quantisation=None))
    backbone = Backbone(Decoder(model), shapes, None)
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(row(name, backbone) for name in METHODS)]
    return HEAD + "\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
