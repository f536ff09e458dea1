"""Measures how each aggregation copes with an attack: one client of seven sends noise of norm 100 as its update.

    python benchmarks/byzantine.py

Trains FedAvg on the embedded model and tasks with seven clients and iid data. The attack is the method `byzantine`
below, which is also an example of a method in a separate file. Prints one JSON line for each aggregation: ROUGE-L and
loss on held-out examples, as means over the honest clients, with and without the attack. Further arguments
(--config.KEY=VALUE) change the config.
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
from flex_jax.federated.method import ClientContext, ClientResult, ClientRule, Method, Trained, Upload, make_result
from flex_jax.main import load, override
from flex_jax.methods import METHODS

AGGREGATIONS = ("mean", "median", "trimmed_mean", "geometric_median", "krum", "multi_krum")
NORM, ATTACKER = 100.0, 3  # the norm of the noise, and the id of the client that sends it


def attack(context: ClientContext, trained: Trained) -> ClientResult:
    """Returns FedAvg's result, but with noise as the upload of ATTACKER; the noise is new in every round."""
    honest = make_result(context, trained)
    key = jax.random.fold_in(jax.random.PRNGKey(0), context.round)
    noise = optax.tree.random_like(key, honest.upload.delta)
    noise = optax.tree.scale(NORM / optax.tree.norm(noise), noise)
    attacks = context.state.extra["client_id"] == ATTACKER
    delta = jax.tree.map(lambda update, noise: jnp.where(attacks, noise, update), honest.upload.delta, noise)
    return honest._replace(upload=Upload(delta))


def byzantine() -> Method:
    """FedAvg with one client that attacks."""
    client = ClientRule(init_extra=lambda shared, client_id: {"client_id": client_id}, make_result=attack)
    return METHODS["fedavg"]()._replace(client=client)


def scores(config, method: str, aggregation: str) -> dict:
    """Returns the mean scores of the honest clients."""
    config = config.copy_and_resolve_references()
    config.method, config.server.aggregation = method, aggregation
    name_methods(config)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            clients = run(config, Path(folder))["runs"][0]["clients"]
    honest = [client for client in clients if client["id"] != ATTACKER]
    return {
        metric: round(float(np.mean([client[metric] for client in honest])), 2) for metric in ("rougeL", "eval_loss")
    }


def main(arguments: list[str] | None = None) -> list[dict]:
    """Runs every aggregation with and without the attack, and prints the results."""
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
