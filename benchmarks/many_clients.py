"""Rounds of a cohort of 20 out of more and more clients: seconds a round and memory should not depend on their number.

    python benchmarks/many_clients.py --clients 40 1000 --rounds 50 --plot many_clients.png

FLEx on the embedded model, slots trained in full; every client draws its examples from the embedded tasks (Dirichlet).
For each number of clients, in a process of its own: the seconds of a round (all of it: rows read from disk, the round,
rows written), median; resident memory after round 10 and after the last; bytes of the clients' files. One JSON line
each, then one with the ratios of the last to the first. Further arguments (--config.KEY=VALUE) change the config.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from flex_jax.config import for_method
from flex_jax.data.sources import load_records
from flex_jax.experiment import build_federation
from flex_jax.federated.checkpoint import Checkpoints
from flex_jax.main import load, override
from flex_jax.reporting.writers import MetricsWriter
from flex_jax.simulation import load_backbone, prepare, train

METHOD = "flex"


def resident_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["RssAnon"].split()[0])


class Watched(MetricsWriter):
    """A metrics writer that notes time and memory whenever a round ends."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.seen = []

    def write(self, *arguments):
        super().write(*arguments)
        self.seen.append((time.perf_counter(), resident_bytes()))


def measure(config, clients: int, folder: Path) -> dict:
    """The rounds of a run, without evaluation."""
    config.clients, config.cohort = clients, 20
    config = for_method(config, METHOD)
    backbone = load_backbone(config)
    federation = build_federation(config, backbone, load_records("tiny", split="train", fields="auto"), seed=0)
    layers, experts = backbone.model.config.moe_layers, backbone.model.config.experts
    chosen = np.random.default_rng(0).integers(0, experts, (clients, layers, 1)).astype(np.int32)
    run = prepare(config, backbone, chosen, jax.random.PRNGKey(0))
    metrics = Watched(folder / "metrics.jsonl")
    with Checkpoints(folder / "run", run.start.clients, clients) as checkpoints:
        train(config, run, federation, (METHOD, 0), metrics, checkpoints, {})
        ended = time.perf_counter()
    times, memory = zip(*metrics.seen, strict=True)
    files = sum(file.stat().st_size for file in (folder / "run/clients").iterdir())
    return {
        "clients": clients,
        "rounds": config.rounds,
        "round_s": round(float(np.median(np.diff(times))), 4),
        "memory_after_10_mb": round(memory[min(9, len(memory) - 1)] / 1e6, 1),
        "memory_at_end_mb": round(memory[-1] / 1e6, 1),
        "files_mb": round(files / 1e6, 1),
        "last_save_s": round(ended - times[-1], 3),
    }


def draw(path: Path, lines: list[dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2), ("round_s", "memory_at_end_mb"), ("seconds a round", "MB"), strict=True
    ):
        axes.plot([line["clients"] for line in lines], [line[key] for line in lines], "o-")
        axes.set(xlabel="clients", ylabel=label, xscale="log", ylim=(0, 1.2 * max(line[key] for line in lines)))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[40, 1000])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--plot", type=Path)
    known, changes = parser.parse_known_args()
    if len(known.clients) == 1:
        config = load("configs/quickstart.py")
        config.rounds, config.local_steps, config.data.partition = known.rounds, 2, "dirichlet"
        config.data.examples_per_client, config.data.test_examples = 32, 1
        override(config, changes)
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
            with contextlib.redirect_stderr(nowhere):
                print(json.dumps(measure(config, known.clients[0], Path(folder))))
        return
    lines = []
    for clients in known.clients:
        command = [sys.executable, __file__, "--clients", str(clients), "--rounds", str(known.rounds), *changes]
        lines.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        print(json.dumps(lines[-1]), flush=True)
    first, last = lines[0], lines[-1]
    ratios = {key: round(last[key] / first[key], 3) for key in ("round_s", "memory_at_end_mb")}
    growth = round(last["memory_at_end_mb"] / last["memory_after_10_mb"], 3)
    print(json.dumps({"last_to_first": ratios, "memory_growth_after_round_10": growth}))
    if known.plot:
        draw(known.plot, lines)


if __name__ == "__main__":
    main()
