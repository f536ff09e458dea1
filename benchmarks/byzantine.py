"""One client of seven sends noise of norm 100 in the place of its update: what each aggregation makes of it.

    python benchmarks/byzantine.py

FedAvg on the embedded model and tasks, seven clients with iid data, one of them `byzantine` (the method below, also an
example of a method in a file of one's own). One JSON line for each aggregation: ROUGE-L and loss on held-out examples,
the mean over the honest clients, with the attack and without. Further arguments (--config.KEY=VALUE) change the config.
"""

import argparse
import contextlib
import json
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flex_jax.config import name_methods
from flex_jax.experiment import run
from flex_jax.federated.method import ClientRule, Outcome, Received, finish
from flex_jax.main import load, override
from flex_jax.methods import METHODS

AGGREGATIONS = ("mean", "median", "trimmed_mean", "geometric_median", "krum", "multi_krum")
NORM, BAD = 100.0, 3  # of the noise; number of the bad client


def attack(received: Received, trained: dict) -> Outcome:
    """FedAvg's update, and of client BAD noise of norm NORM, drawn anew in every round."""
    honest = finish(received, trained)
    key = jax.random.fold_in(jax.random.PRNGKey(0), received.round)
    noise = optax.tree.random_like(key, honest.upload["delta"])
    noise = optax.tree.scale(NORM / optax.tree.norm(noise), noise)
    bad = received.client.kept["number"] == BAD
    delta = jax.tree.map(lambda own, other: jnp.where(bad, other, own), honest.upload["delta"], noise)
    return honest._replace(upload={"delta": delta})


byzantine = METHODS["fedavg"]._replace(
    client=ClientRule(init=lambda shared, settings, client: {"number": jnp.int32(client)}, finish=attack)
)


def scores(config, method: str, aggregation: str) -> dict:
    """Means over the honest clients."""
    config = config.copy_and_resolve_references()
    config.method, config.server.aggregation = method, aggregation
    name_methods(config)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            clients = run(config, Path(folder))["runs"][0]["clients"]
    honest = [client for client in clients if client["id"] != BAD]
    return {
        metric: round(float(np.mean([client[metric] for client in honest])), 2) for metric in ("rougeL", "eval_loss")
    }


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py")
    known, changes = parser.parse_known_args(arguments)
    config = load(known.config)
    config.seeds, config.clients, config.overrides = (0,), 7, {}
    config.data.partition, config.data.examples_per_client, config.data.test_examples = "iid", 64, 20
    config.lora.rank, config.lora.alpha = 28, 56.0
    override(config, changes)
    lines = []
    for aggregation in AGGREGATIONS:
        attacked = scores(config, f"{__file__}:byzantine", aggregation)
        lines.append(
            {"aggregation": aggregation, "attacked": attacked, "honest": scores(config, "fedavg", aggregation)}
        )
        print(json.dumps(lines[-1]), flush=True)
    return lines


if __name__ == "__main__":
    main()
