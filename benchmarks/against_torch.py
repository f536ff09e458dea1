r"""Compares our round with that of a PyTorch + peft program (the peer) on the same shape and machine.

    python benchmarks/against_torch.py --peer PEER --python PEER_PYTHON --shape small \
        --clients 4 --batch 4 --sequence 128 --steps 2

--peer is a folder whose bench.py prints a JSON line with `tokens_per_s` and `round_s_median`, and whose fedmoe.py
defines the shape by name. --python is an interpreter with the packages of the peer. Both programs use random weights in
float32 (bfloat16 with --device cuda), LoRA of rank 32 with dropout 0.05, and for FLEx a fully trained slot. The two
programs alternate, each runs --repeats times, and the peer runs with each of --experts. It prints one JSON line for
each run, and then the ratio of our median to the median of the peer's best setting.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from measure import draw_bars, emit

HERE = Path(__file__).parent
WRITE_SHAPE = "import sys; from fedmoe import qwen2moe_config as shape; shape(sys.argv[1]).save_pretrained(sys.argv[2])"


def last_line(command: list, folder: Path | None = None) -> dict:
    """Runs a program and returns the JSON object in its last line."""
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Runs both programs and prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="the folder of the PyTorch program")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that runs it")
    parser.add_argument("--shape", default="small")
    parser.add_argument("--method", default="flex")
    for name, default in (("clients", 4), ("batch", 4), ("sequence", 128), ("steps", 2), ("rounds", 5), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--experts", nargs="+", default=["grouped_mm", "eager"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([options.python, "-c", WRITE_SHAPE, options.shape, folder], cwd=options.peer, check=True)
        values = {
            "clients": options.clients,
            "batch_size": options.batch,
            "sequence_length": options.sequence,
            "local_steps": options.steps,
            "model.remat": options.device == "cuda",  # without it the products of a real shape would not fit
        } | ({"model.dtype": "bfloat16"} if options.device == "cuda" else {})
        ours = [sys.executable, HERE / "round.py", Path(folder) / "config.json", "--method", options.method]
        ours += ["--rounds", options.rounds, *(f"--config.{key}={value}" for key, value in values.items())]
        theirs = [options.python, "bench.py", "--config", options.shape, "--method", options.method]
        theirs += ["--clients", options.clients, "--batch", options.batch, "--seq", options.sequence]
        theirs += ["--steps", options.steps, "--rounds", options.rounds, "--device", options.device]
        speeds = {}
        for _ in range(options.repeats):
            for name in ("ours", *options.experts):
                command = ours if name == "ours" else [*theirs, "--experts-impl", name]
                line = last_line(command, None if name == "ours" else options.peer)
                speeds.setdefault(name, []).append(line["tokens_per_s"])
                print(json.dumps({"program": name, "tokens_per_s": line["tokens_per_s"]}), flush=True)
    best = max(options.experts, key=lambda name: median(speeds[name]))
    ratio = median(speeds["ours"]) / median(speeds[best])
    medians = {name: round(median(values), 1) for name, values in speeds.items()}
    if options.plot:
        draw_bars(options.plot, f"{options.shape}: {ratio:.2f} times the peer's best", "tokens/s", medians)
    emit({"shape": options.shape, "tokens_per_s": medians, "best_peer": best, "ratio": round(ratio, 2)})


if __name__ == "__main__":
    main()
