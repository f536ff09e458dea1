"""Measures the start: importing the package, printing its help, and the first round of the quickstart.

    python benchmarks/startup.py --plot startup.png

Every figure is for a fresh interpreter, in seconds from its start. `import_s` is for `import flex_jax`, `import_run_s`
for everything that a run imports (flex_jax.experiment), and `help_s` for `python -m flex_jax.main --help`; all are
medians of three. The first round is that of FLEx in configs/quickstart.py. It ends when its line is in metrics.jsonl;
then the program is killed. "cold" is with an empty JAX_COMPILATION_CACHE_DIR; "warm" is in a new work directory with
the cache of the cold run. `compile_s` is the part of the time in which XLA compiles the `programs` or reads them from
the cache. Prints one JSON line.
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
    """Returns the median seconds of three fresh interpreters, after one that warms the file cache."""
    taken = []
    for _ in range(4):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - started)
    return round(median(taken[1:]), 2)


def has_round(metrics: Path) -> bool:
    """Returns whether the file has the line of a whole round, which names no client."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return any(json.loads(line)["client"] is None for line in lines)


def first_round(folder: Path, name: str) -> dict[str, float]:
    """Returns the seconds until the first round ends, the seconds of XLA, and the number of programs."""
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
    """Measures everything and prints the result."""
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
        values = {"import flex_jax": result["import_s"], "import everything": result["import_run_s"]}
        values |= {"--help": result["help_s"]}
        for name in ("cold", "warm"):
            values |= {f"first round, {name}": result[name]["first_round_s"]}
            values |= {f"XLA part, {name}": result[name]["compile_s"]}
        draw_bars(options.plot, f"Start-up: {result['device']}", "seconds", values)
    return emit(result)


if __name__ == "__main__":
    main()
