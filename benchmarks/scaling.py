"""Measures how a round scales with clients, sequence length and experts, for a fixed number of tokens.

    python benchmarks/scaling.py benchmarks/shapes/small.json --tokens 2048 --plot scaling.png

Runs benchmarks/round.py for three sweeps, each point in a separate process: over --clients, with the longest sequence
of up to 128 tokens that fits for all of them; over --sequences with one client; and over --experts with 4 clients. The
batch size is such that a step of all clients has --tokens tokens; points without such a batch size are skipped. Prints
one JSON line with, for each point, the tokens per second, the gigabytes of the compiled round, and the time relative to
the first point. Further arguments (--config.KEY=VALUE) apply to all points.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import emit

ROUND = Path(__file__).with_name("round.py")


def point(shape: Path, tokens: int, changes: list[str], *, clients: int, sequence: int) -> dict | None:
    """Returns the JSON line of round.py for one setting, or None if no batch size gives this number of tokens."""
    batch, rest = divmod(tokens, clients * sequence)
    if rest or not batch:
        return None
    values = {"clients": clients, "batch_size": batch, "sequence_length": sequence, "local_steps": 2}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    command = [sys.executable, ROUND, shape, *flags, "--config.model.remat=False", *changes]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def sweep(measure, values: list[int]) -> dict:
    """Returns speed, memory and time relative to the first point for every value that can be measured."""
    lines = {value: measure(value) for value in values}
    lines = {value: line for value, line in lines.items() if line}
    first = next(iter(lines.values()))["round_s"] if lines else None
    return {
        value: {
            "tokens_per_s": line["tokens_per_s"],
            "round_gb": line["round_gb"],
            "time": round(line["round_s"] / first, 3),
        }
        for value, line in lines.items()
    }


def draw(path: Path, sweeps: dict[str, dict]) -> None:
    """Draws the tokens per second of each sweep."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, (name, lines) in zip(figure.subplots(1, len(sweeps)), sweeps.items(), strict=True):
        axes.plot(list(lines), [line["tokens_per_s"] for line in lines.values()], "o-")
        axes.set_xscale("log", base=2)
        axes.set(xlabel=name, ylabel="tokens/s")
        axes.set_ylim(0, 1.1 * max((line["tokens_per_s"] for line in lines.values()), default=1))
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs the sweeps and prints their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a config.json")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--sequences", type=int, nargs="*", default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--experts", type=int, nargs="*", default=[8, 16, 32, 64, 128])
    parser.add_argument("--plot", type=Path)
    options, changes = parser.parse_known_args()
    shortest = min(128, options.tokens // max(options.clients, default=1))
    shape = json.loads(options.model.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:

        def with_experts(count):
            file = Path(folder) / f"{count}.json"
            file.write_text(json.dumps(shape | {"num_experts": count}), encoding="utf-8")
            return point(file, options.tokens, changes, clients=4, sequence=shortest)

        sweeps = {
            "clients": sweep(
                lambda n: point(options.model, options.tokens, changes, clients=n, sequence=shortest), options.clients
            ),
            "sequence": sweep(
                lambda n: point(options.model, options.tokens, changes, clients=1, sequence=n), options.sequences
            ),
            "experts": sweep(with_experts, options.experts),
        }
    if options.plot:
        draw(options.plot, sweeps)
    emit({"model": options.model.stem, "tokens a step": options.tokens, **sweeps})


if __name__ == "__main__":
    main()
