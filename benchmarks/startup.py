"""How long it takes to begin: to import the package, to print its help, to finish the first round of the quickstart.

    python benchmarks/startup.py --plot startup.png

Every figure is of a fresh interpreter, in seconds from its start. `import_s` is of `import flex_jax` and
`import_run_s` of all that a run needs (flex_jax.experiment), `help_s` of `python -m flex_jax.main --help`; medians of
three. The first round is that of FLEx in configs/quickstart.py, until its line is in metrics.jsonl, when the program is
ended: cold with an empty JAX_COMPILATION_CACHE_DIR, then warm in a new work directory with the cache that the first
left. `compile_s` is what of it XLA takes to compile its `programs` or to read them from the cache. Prints one JSON
line.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from measure import device, draw_bars, emit

ROOT = Path(__file__).parent.parent
COMPILED = re.compile(r"Finished XLA compilation of .* in ([\d.]+) sec")
QUICKSTART = ["-m", "flex_jax.main", "--config", "configs/quickstart.py", '--config.methods=("flex",)']


def interpreter_seconds(*arguments: str) -> float:
    """Median seconds of three fresh interpreters, after one that warms the file cache."""
    taken = []
    for _ in range(4):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - started)
    return round(median(taken[1:]), 2)


def has_round(metrics: Path) -> bool:
    """Whether the line of a round as a whole is there: it has no client."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return any(json.loads(line)["client"] is None for line in lines)


def first_round(folder: Path, name: str) -> dict[str, float]:
    """Seconds until the first round has ended, of which seconds in XLA, and programs compiled or read."""
    workdir, log = folder / name, folder / f"{name}.log"
    command = [sys.executable, *QUICKSTART, "--config.seeds=(0,)", "--workdir", str(workdir)]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_LOG_COMPILES": "1"}
    started = time.perf_counter()
    with open(log, "w") as file:
        program = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while not has_round(workdir / "metrics.jsonl"):
                if program.poll() is not None:
                    raise SystemExit(f"{name}: ended without a round\n{log.read_text()[-2000:]}")
                time.sleep(0.01)
            taken = time.perf_counter() - started
        finally:
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)
                program.wait()
    compiled = [float(seconds) for seconds in COMPILED.findall(log.read_text())]
    return {"first_round_s": round(taken, 2), "compile_s": round(sum(compiled), 2), "programs": len(compiled)}


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    result = {
        "import_s": interpreter_seconds("-c", "import flex_jax"),
        "import_run_s": interpreter_seconds("-c", "import flex_jax.experiment"),
        "help_s": interpreter_seconds("-m", "flex_jax.main", "--help"),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            result[name] = first_round(Path(folder), name)
    result["device"] = device()
    if options.plot:
        values = {"import flex_jax": result["import_s"], "import all of it": result["import_run_s"]}
        values |= {"--help": result["help_s"]}
        for name in ("cold", "warm"):
            values |= {f"first round, {name}": result[name]["first_round_s"]}
            values |= {f"of it XLA, {name}": result[name]["compile_s"]}
        draw_bars(options.plot, f"Start of the quickstart: {result['device']}", "seconds", values)
    return emit(result)


if __name__ == "__main__":
    main()
