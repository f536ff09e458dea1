"""Searches the learning rate of every method of a config on the same grid with the same seeds.

    python tools/learning_rates.py --config configs/quickstart.py --rates 1e-3 2e-3 4e-3 8e-3 --seeds 100 101

Prints one JSON line for each method and rate, and then the best rate of each method by mean ROUGE-L. Use other seeds
than those of the config, so that the rate is not chosen on the reported seeds. The final rate of the cosine is a tenth
of the first. Further arguments (--config.KEY=VALUE) change the config, as for a run.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from flex_jax.errors import FailedRuns
from flex_jax.experiment import run
from flex_jax.main import load, override


def score(config: ConfigDict, method: str, rate: float) -> dict:
    """Returns the results of one method with one rate, over the seeds of the config."""
    config = config.copy_and_resolve_references()
    config.methods = (method,)
    config.optimizer.learning_rate, config.optimizer.final_learning_rate = rate, rate / 10
    if "optimizer" in config.overrides.get(method, {}):
        del config.overrides[method].optimizer
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            runs = run(config, Path(folder))["runs"]
    scores = {metric: [round(run["average"][metric], 3) for run in runs] for metric in ("rougeL", "eval_loss")}
    return {"method": method, "learning_rate": rate, "mean": round(float(np.mean(scores["rougeL"])), 2)} | scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py", help="a config file of a run")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101])
    arguments, changes = parser.parse_known_args()
    config = load(arguments.config)
    config.seeds = tuple(arguments.seeds)
    override(config, changes)
    results = []
    for method in config.methods:
        for rate in arguments.rates:
            try:
                results.append(score(config, method, rate))
            except FailedRuns as error:
                print(f"{method} at {rate:g}: {error}", file=sys.stderr)
            else:
                print(json.dumps(results[-1]), flush=True)
    for method in config.methods:
        if candidates := [result for result in results if result["method"] == method]:
            best = max(candidates, key=lambda result: result["mean"])
            print(f"best {method}: {best['learning_rate']:g} (ROUGE-L {best['mean']:.2f})")
