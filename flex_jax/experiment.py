"""A whole experiment: build, plan, run every method with every seed, report."""

import json
import sys
import traceback
from importlib.metadata import version
from pathlib import Path

import jax
from ml_collections import ConfigDict

from flex_jax.building import (
    PreparedMethod,
    build_backbone,
    build_federation,
    check_method_names,
    plan_row,
    prepare_method,
    resolve_method,
)
from flex_jax.config import name_methods, validate
from flex_jax.data.sources import load_records
from flex_jax.errors import FailedRuns, InputError
from flex_jax.federated.cohort import read_availability
from flex_jax.files import write_json, write_text
from flex_jax.memory import check_plan
from flex_jax.methods import user_frame
from flex_jax.metrics_log import MetricsLog, read_metrics
from flex_jax.reporting.page import write_report
from flex_jax.reporting.tables import plan_table, summary_table
from flex_jax.results import Failure, Results, read_results, summarise, write_results
from flex_jax.training import run_one

PACKAGES = ("flex_jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers")


def run(config: ConfigDict, workdir: Path) -> Results:
    """Runs a config's methods x seeds under `workdir`, and returns the content of results.json.

    Runs that are finished in the work directory are not repeated, and an interrupted one resumes from its newest
    checkpoint. A run that fails does not stop the others: it is in results.json under "failures", its traceback is
    under failures/, and the same command tries it again.

    Raises:
        InputError: a mistake in the config, the data or the checkpoint, or a work directory of another config.
        FailedRuns: a run failed; raised at the end.
    """
    config = config.copy_and_resolve_references()
    name_methods(config)
    validate(config)
    check_method_names(config)
    resolved = [resolve_method(config, name) for name in config.methods]
    if config.availability:
        read_availability(config.availability, config.clients, config.cohort or config.clients)
    backbone = build_backbone(config)
    records = load_records(config.data.path, split=config.data.split, fields=config.data.fields)
    federations = {seed: build_federation(config, backbone, records, seed) for seed in config.seeds}
    methods = [prepare_method(method, backbone) for method in resolved]
    for method in methods:
        check_plan(method.name, method.plan)
    check_workdir(workdir, config)
    metrics = MetricsLog(workdir / "metrics.jsonl")
    print(plan_table([plan_row(method) for method in methods]), flush=True)
    results = read_results(workdir) or new_results()
    finished = {(entry["method"], entry["seed"]) for entry in results["runs"]}
    results["failures"] = []
    for method in methods:
        jax.clear_caches()  # drops the programs of the last method: a process can hold only so many
        for seed in config.seeds:
            if (method.name, seed) in finished:
                continue
            try:
                entry = run_one(method, backbone, federations[seed], seed, workdir, metrics)
            except Exception as error:  # whatever breaks one method must not lose the others
                results["failures"].append(record_failure(workdir, method, seed, error))
            else:
                failure_file(workdir, method.name, seed).unlink(missing_ok=True)
                results["runs"].append(entry)
            results["summary"] = summarise(results["runs"])
            write_results(workdir, results)
    if results["runs"]:
        notes = [comparison_note(config, methods), *([config.note] if config.note else [])]
        write_report(workdir / "report.html", results, read_metrics(metrics.path), notes=notes, config=config.to_dict())
        write_text(workdir / "summary.txt", f"{summary_table(results)}\n")
        print(summary_table(results))
        print(f"report: {workdir / 'report.html'}")
    if failures := results["failures"]:
        first = f"{failures[0]['method']} seed {failures[0]['seed']}: {failures[0]['error']}"
        runs = len(config.methods) * len(config.seeds)
        raise FailedRuns(f"{len(failures)} of {runs} runs failed ({first}): see {workdir / 'failures'}")
    return results


def failure_file(workdir: Path, name: str, seed: int) -> Path:
    return workdir / "failures" / f"{name}-seed{seed}.txt"


def record_failure(workdir: Path, method: PreparedMethod, seed: int, error: Exception) -> Failure:
    """Writes the traceback of a run that failed to a file, and returns its entry of results.json."""
    file = failure_file(workdir, method.name, seed)
    file.parent.mkdir(exist_ok=True)
    write_text(file, "".join(traceback.format_exception(error)))
    frame = "" if isinstance(error, InputError) else user_frame(method.config.method, error)
    line = f"{frame}: " if frame else ""
    line += f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    print(f"flex_jax: {method.name} seed {seed} failed: {line}", file=sys.stderr)
    return {"method": method.name, "seed": seed, "error": line}


def check_workdir(workdir: Path, config: ConfigDict) -> None:
    """Writes config.json, or checks that the one in the work directory is equal."""
    wanted = json.loads(json.dumps(config.to_dict()))
    file = workdir / "config.json"
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found != wanted:
            keys = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
            raise InputError(
                f"{workdir} holds a run of another config (different: {', '.join(keys)}); give another --workdir"
            )
        return
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(file, wanted)


def new_results() -> Results:
    """Returns results without runs, with the versions of packages and the device."""
    versions = {name: version(name) for name in PACKAGES}
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})"
    return {"runs": [], "summary": [], "failures": [], "versions": versions, "device": device}


def comparison_note(config: ConfigDict, methods: list[PreparedMethod]) -> str:
    """Returns a sentence for the report: what was equal for all methods and what was not."""
    trained = "; ".join(
        f"{method.name} {method.plan.trained_per_client:,} (learning rate {method.config.optimizer.learning_rate:g})"
        for method in methods
    )
    return (
        f"Every method ran {config.rounds} rounds of {config.local_steps} local steps, {config.batch_size} examples a "
        f"step, on the same clients, batches and seeds. Parameters trained by a client: {trained}."
    )
