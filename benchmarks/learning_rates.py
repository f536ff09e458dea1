"""Search the learning rate of every method of a config equally: the same grid, the same seeds for all.

    python benchmarks/learning_rates.py --config configs/quickstart.py --rates 1e-3 2e-3 4e-3 8e-3 --seeds 100 101

Prints one JSON line a method and rate, then the best rate of each method by mean ROUGE-L. The seeds are none of the
config's, so that the reported seeds are not those that chose the rate. The last rate of the cosine is a tenth of the
first. Further arguments (--config.KEY=VALUE) change the config, as on the command line of a run.
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
    """Results of one method at one rate, over the seeds of the config."""
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
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101])
    arguments, changes = parser.parse_known_args()
    config = load(arguments.config)
    config.seeds = tuple(arguments.seeds)
    override(config, changes)
    rows = []
    for method in config.methods:
        for rate in arguments.rates:
            try:
                rows.append(score(config, method, rate))
            except FailedRuns as error:
                print(f"{method} at {rate:g}: {error}", file=sys.stderr)
            else:
                print(json.dumps(rows[-1]), flush=True)
    for method in config.methods:
        if own := [row for row in rows if row["method"] == method]:
            best = max(own, key=lambda row: row["mean"])
            print(f"best {method}: {best['learning_rate']:g} (ROUGE-L {best['mean']:.2f})")
