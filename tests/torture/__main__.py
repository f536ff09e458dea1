"""Runs the battery: python -m tests.torture [KIND ...] [--seed N] [--case WORDS] [--quick]."""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # before these libraries are imported
os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "flex_jax-torture-compiled"))

import tests.conftest  # noqa: F401, I001  (sets how XLA compiles tests)
from tests.torture import (
    checkpoints,
    clients,
    configs,
    determinism,
    disk,
    flips,
    kills,
    names,
    processes,
    records,
    signals,
    workdirs,
)
from tests.torture.battery import BAD, Outcome, Report, run_all
from tests.torture.programs import Lab, Program, make_reference
from tests.program import save_checkpoint

MODULES = (kills, signals, disk, flips, processes, clients, workdirs, determinism, names, configs, records, checkpoints)
KINDS = {module.__name__.rpartition(".")[2]: module for module in MODULES}
METHODS = ("flex", "scaffold", "flora", "ditto")


def table(reports: list[Report], kinds: list[str]) -> str:
    """Returns the counts of all outcomes by kind."""
    counts = Counter((report.kind, report.outcome) for report in reports)
    rows = [
        [kind, sum(counts[kind, one] for one in Outcome), *(counts[kind, one] for one in Outcome)] for kind in kinds
    ]
    rows.append(["all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])])
    lines = [["kind", "tried", *Outcome], *rows]
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(str(cell).rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def make_model(words: list[str]) -> int:
    save_checkpoint(Path(words[0]))
    return 0


def make_lab(folder: Path, seed: int, quick: bool) -> Lab:
    Program([f"{folder}/model"], folder / "log", command=make_model).wait()
    references = {name: make_reference(folder / name, (name,)) for name in METHODS[: 1 if quick else None]}
    if quick:
        return Lab(folder, seed, quick, references, references["flex"], references["flex"])
    pair = make_reference(folder / "pair", ("flex", "local"))
    other_seed = make_reference(folder / "other_seed", ("flex",), "--config.seeds=1,")
    return Lab(folder, seed, quick, references, pair, other_seed)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.torture", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"default all: {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    parser.add_argument("--case", default="", help="only the cases with this in their name")
    parser.add_argument("--quick", action="store_true", help="a selection that takes a minute")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="cases at a time")
    options = parser.parse_args()
    if unknown := set(options.kinds) - KINDS.keys():
        parser.error(f"unknown kinds: {', '.join(unknown)}")
    names = [kind for kind in KINDS if not options.kinds or kind in options.kinds]
    started = time.perf_counter()
    print(f"seed {options.seed}, {options.workers} at a time", flush=True)
    with tempfile.TemporaryDirectory(prefix="torture-", ignore_cleanup_errors=True) as folder:
        lab = make_lab(Path(folder), options.seed, options.quick)
        kinds = {name: [case for case in KINDS[name].cases(lab) if options.case in case.name] for name in names}
        reports, total = [], sum(map(len, kinds.values()))
        for report in run_all(lab.folder, kinds, options.workers):
            reports.append(report)
            if report.outcome in BAD:
                print(f"\n{report.kind}: {report.case}: {report.outcome}\n  {report.detail.strip()}", flush=True)
                again = f'python -m tests.torture {report.kind} --seed {options.seed} --case "{report.case}"'
                print(f"  again: {again}{' --quick' * options.quick}", flush=True)
            elif report.detail:
                print(f"\n{report.kind}: {report.case}: {report.detail}", flush=True)
            if sys.stderr.isatty() or len(reports) % 50 == 0 or len(reports) == total:
                seconds = time.perf_counter() - started
                print(f"\r{len(reports)} of {total} cases, {seconds:.0f} s", end="", file=sys.stderr, flush=True)
    print(f"\n{table(reports, names)}")
    return int(any(report.outcome in BAD for report in reports))


if __name__ == "__main__":
    sys.exit(main())
