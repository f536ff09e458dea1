"""Search the learning rate of every method of a config equally: the same grid, the same held-out seed for all.

    python benchmarks/learning_rates.py --config configs/quickstart.py --rates 3e-3 6e-3 --seed 100

Prints one JSON line a run, then the best rate of each method by average ROUGE-L. The seed is none of the config's, so
that the reported seeds are not those that chose the rate. The last rate of the cosine is a tenth of the first.
"""

import argparse
import contextlib
import json
import os
import tempfile
from pathlib import Path

from flex_jax.experiment import run
from flex_jax.main import load


def score(config_file: str, method: str, rate: float, seed: int) -> dict:
    config = load(config_file)
    config.methods, config.seeds = (method,), (seed,)
    config.optimizer.learning_rate, config.optimizer.final_learning_rate = rate, rate / 10
    if "optimizer" in config.overrides.get(method, {}):
        del config.overrides[method].optimizer
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            average = run(config, Path(folder))["runs"][0]["average"]
    return {"method": method, "learning_rate": rate, "rougeL": average["rougeL"], "eval_loss": average["eval_loss"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 6e-3])
    parser.add_argument("--seed", type=int, default=100)
    arguments = parser.parse_args()
    rows = []
    for method in load(arguments.config).methods:
        for rate in arguments.rates:
            rows.append(score(arguments.config, method, rate, arguments.seed))
            print(json.dumps(rows[-1]), flush=True)
    for method in dict.fromkeys(row["method"] for row in rows):
        best = max((row for row in rows if row["method"] == method), key=lambda row: row["rougeL"])
        print(f"best {method}: {best['learning_rate']:g} (ROUGE-L {best['rougeL']:.2f})")
