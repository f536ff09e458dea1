"""Measures the loss of quality from quantised frozen weights, on the embedded model and tasks.

    python benchmarks/quantised.py --plot quantised.png

Measures the perplexity of the embedded model on 512 unseen documents of its corpus. Then it trains FLEx of
configs/quickstart.py on each kind of backbone, with rematerialisation, for all seeds of the config. Prints one JSON
line for each kind: `perplexity_ratio`, relative to float32; `loss_distance`, the largest difference between the mean
training-loss curves of this kind and of float32; `loss_noise`, the largest standard deviation over seeds of a round's
loss in float32; mean and standard deviation of ROUGE-L; and the bytes of the backbone. Further arguments
(--config.KEY=VALUE) change the config.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from transformers import AutoTokenizer

from flex_jax import load_pretrained
from flex_jax.experiment import run
from flex_jax.federated.compression import tree_bytes
from flex_jax.main import load, override
from flex_jax.metrics_log import read_metrics
from flex_jax.models.objective import response_loss
from flex_jax.tiny import CHECKPOINT

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from tiny_corpus import documents

KINDS = ("none", "int8", "int4")


def perplexity(kind: str, texts: int, seed: int, length: int = 128) -> tuple[float, int]:
    """Returns the perplexity of the embedded model on `texts` unseen documents, and the bytes of its parameters."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    unseen = itertools.islice(documents(seed, office_words=True), texts)
    encoded = [tokenizer(text)["input_ids"][:length] for text in unseen]
    tokens = np.array([ids + [0] * (length - len(ids)) for ids in encoded], np.int32)
    mask = np.array([[1] * len(ids) + [0] * (length - len(ids)) for ids in encoded], np.float32)
    model, frozen = load_pretrained(CHECKPOINT, quantisation=None if kind == "none" else kind)
    loss = jax.jit(partial(response_loss, model))
    sums = [loss({"params": frozen}, tokens[i : i + 64], mask[i : i + 64]) for i in range(0, texts, 64)]
    total, count = np.asarray(sums, np.float64).sum(0)
    return float(np.exp(total / count)), tree_bytes(frozen)


def train(config: ConfigDict, kind: str) -> tuple[np.ndarray, dict]:
    """Returns the training loss [seeds, rounds] and the summary of ROUGE-L, for FLEx on this kind of backbone."""
    config = config.copy_and_resolve_references()
    config.methods, config.model.quantisation, config.model.remat = ("flex",), kind, True
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            results = run(config, Path(folder))
        rounds = [line for line in read_metrics(Path(folder) / "metrics.jsonl") if line["client"] is None]
    curves = [[line["train_loss"] for line in rounds if line["seed"] == seed] for seed in config.seeds]
    return np.array(curves), next(row for row in results["summary"] if row["metric"] == "rougeL")


def draw(path: Path, curves: dict[str, np.ndarray]) -> None:
    """Draws the mean training loss of each kind, and the standard deviation of float32 over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    rounds = np.arange(1, curves["none"].shape[1] + 1)
    spread = curves["none"].std(0, ddof=1)
    axes.fill_between(rounds, curves["none"].mean(0) - spread, curves["none"].mean(0) + spread, alpha=0.25, lw=0)
    for kind, label in zip(KINDS, ("float32 and its deviation over seeds", "int8", "int4"), strict=True):
        axes.plot(rounds, curves[kind].mean(0), label=label)
    axes.set(xlabel="round", ylabel="training loss (nats per response token)", title="FLEx on a quantised backbone")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--plot", type=Path)
    arguments, changes = parser.parse_known_args()
    config = load(arguments.config)
    override(config, changes)
    curves, reference = {}, perplexity("none", 512, 12345)[0]
    for kind in KINDS:
        value, size = perplexity(kind, 512, 12345)
        curves[kind], rouge = train(config, kind)
        line = {"quantisation": kind, "backbone_bytes": size, "perplexity": round(value, 4)}
        line["perplexity_ratio"] = round(value / reference, 4)
        line["loss_distance"] = round(float(np.abs(curves[kind].mean(0) - curves["none"].mean(0)).max()), 4)
        line["loss_noise"] = round(float(curves["none"].std(0, ddof=1).max()), 4)
        print(json.dumps(line | {"rougeL": [round(rouge["mean"], 2), round(rouge["std"], 2)]}), flush=True)
    if arguments.plot:
        draw(arguments.plot, curves)
