"""Measures rounds with a cohort of 20 for several numbers of clients: time and memory should not depend on them.

    python benchmarks/many_clients.py --clients 40 1000 --rounds 50 --plot many_clients.png

Trains FLEx on the embedded model with fully trained slots. Every client draws its examples from the embedded tasks
(Dirichlet). Each number of clients runs in a separate process and gives one JSON line: the median seconds of a round,
including reading and writing client states; resident memory after round 10 and after the last round; and the bytes of
the clients' files. The last JSON line has the ratios of the last to the first number. Further arguments
(--config.KEY=VALUE) change the config.
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

from flex_jax.building import build_backbone, build_federation, prepare_method, resolve_method, start_run
from flex_jax.data.sources import load_data
from flex_jax.federated.checkpoint import Checkpoints
from flex_jax.main import load, override
from flex_jax.metrics_log import MetricsLog
from flex_jax.training import Run, train

METHOD = "flex"


def resident_bytes() -> int:
    """Returns the anonymous resident memory of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["RssAnon"].split()[0])


class WatchedLog(MetricsLog):
    """A metrics log that records time and memory whenever a round ends."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.seen = []

    def write(self, *arguments):
        super().write(*arguments)
        self.seen.append((time.perf_counter(), resident_bytes()))


def measure(config, num_clients: int, folder: Path) -> dict:
    """Returns time and memory of the rounds of a run, without evaluation."""
    config.clients, config.cohort = num_clients, 20
    backbone = build_backbone(config)
    prepared = prepare_method(resolve_method(config, METHOD), backbone)
    federation = build_federation(prepared.config, backbone, load_data("tiny"), seed=0)
    shape = num_clients, backbone.model.config.num_moe_layers, 1
    expert_index = np.random.default_rng(0).integers(0, backbone.model.config.num_experts, shape).astype(np.int32)
    start = start_run(prepared.config, prepared.spec, backbone, expert_index, jax.random.PRNGKey(0))
    metrics = WatchedLog(folder / "metrics.jsonl")
    with Checkpoints(folder / "run", start.init_clients, num_clients) as checkpoints:
        train(Run(prepared, backbone, federation, 0, start), metrics, checkpoints)
        ended = time.perf_counter()
    times, memory = zip(*metrics.seen, strict=True)
    files = sum(file.stat().st_size for file in (folder / "run/clients").iterdir())
    return {
        "clients": num_clients,
        "rounds": config.rounds,
        "round_s": round(float(np.median(np.diff(times))), 4),
        "memory_after_10_mb": round(memory[min(9, len(memory) - 1)] / 1e6, 1),
        "memory_at_end_mb": round(memory[-1] / 1e6, 1),
        "files_mb": round(files / 1e6, 1),
        "last_save_s": round(ended - times[-1], 3),
    }


def draw(path: Path, lines: list[dict]) -> None:
    """Draws time and memory over the number of clients."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2), ("round_s", "memory_at_end_mb"), ("seconds per round", "MB"), strict=True
    ):
        axes.plot([line["clients"] for line in lines], [line[key] for line in lines], "o-")
        axes.set(xlabel="clients", ylabel=label, xscale="log", ylim=(0, 1.2 * max(line[key] for line in lines)))
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures every number of clients and prints the results."""
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
    for num_clients in known.clients:
        command = [sys.executable, __file__, "--clients", str(num_clients), "--rounds", str(known.rounds), *changes]
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
