"""A whole experiment: build, plan, run every method with every seed, report."""

import json
import sys
import traceback
from importlib.metadata import version
from pathlib import Path

import jax
from ml_collections import ConfigDict

import flex_jax
from flex_jax.config import for_method
from flex_jax.data.batches import encode_client, evaluation_batches
from flex_jax.data.partition import ClientRecords, partition
from flex_jax.data.prompts import encode_prompt
from flex_jax.data.sources import load_records
from flex_jax.errors import FailedRuns, InputError
from flex_jax.evaluation.evaluate import HeldOut
from flex_jax.federated.cohort import read_availability
from flex_jax.methods import Method, blame, find_method
from flex_jax.reporting.page import write_report
from flex_jax.reporting.tables import plan_table, summary_table
from flex_jax.reporting.writers import MetricsWriter, read_metrics, summarise, write_json, write_text
from flex_jax.simulation import Backbone, Federation, describe, load_backbone, run_one


def run(config: ConfigDict, workdir: Path) -> dict:
    """Run a validated config's methods x seeds under `workdir`, and return what results.json holds.

    Finished runs that are in the work directory already are kept and an interrupted one goes on from its newest
    checkpoint. A run that fails does not keep the others from running: it is in results.json under "failures", its
    traceback under failures/, and the same command tries it again.

    Raises InputError for a mistake in the config, the data or the checkpoint, or when the work directory belongs to
    another config; FailedRuns, at the end, when a run failed.
    """
    methods = {name: find_method(for_method(config, name).method) for name in config.methods}
    backbone = load_backbone(config)
    check_slots(config, backbone, methods)
    if config.availability:
        read_availability(config.availability, config.clients, config.cohort or config.clients)
    records = load_records(config.data.path, split=config.data.split, fields=config.data.fields)
    federations = {seed: build_federation(config, backbone, records, seed) for seed in config.seeds}
    rows = [plan_method(config, backbone, name) for name in config.methods]
    claim(workdir, config)
    metrics = MetricsWriter(workdir / "metrics.jsonl")
    print(plan_table(rows), flush=True)
    results = load_results(workdir)
    done = {(finished["method"], finished["seed"]) for finished in results["runs"]}
    results["failures"] = []
    for name in config.methods:
        jax.clear_caches()  # the programs of the last method: a process can hold so many of them only
        compiled = {}  # one compilation serves all rounds and seeds of a method
        for seed in config.seeds:
            if (name, seed) in done:
                continue
            try:
                finished = run_one(config, backbone, federations[seed], name, seed, workdir, metrics, compiled)
            except Exception as error:  # whatever breaks one method must not lose the others
                results["failures"].append(failure(workdir, config, name, seed, error))
            else:
                failure_file(workdir, name, seed).unlink(missing_ok=True)
                results["runs"].append(finished)
            results["summary"] = summarise(results["runs"])
            write_json(workdir / "results.json", results)
    if results["runs"]:
        notes = [fairness(config, results), *([config.note] if config.note else [])]
        write_report(workdir / "report.html", results, read_metrics(metrics.path), notes=notes, config=config.to_dict())
        write_text(workdir / "summary.txt", f"{summary_table(results)}\n")
        print(summary_table(results))
        print(f"report: {workdir / 'report.html'}")
    if failed := results["failures"]:
        first = f"{failed[0]['method']} seed {failed[0]['seed']}: {failed[0]['error']}"
        runs = len(config.methods) * len(config.seeds)
        raise FailedRuns(f"{len(failed)} of {runs} runs failed ({first}): see {workdir / 'failures'}")
    return results


def plan_method(config: ConfigDict, backbone: Backbone, name: str) -> dict:
    """`describe`, which traces a method for the first time: a mistake in a file of the user's is an InputError."""
    method = for_method(config, name).method
    try:
        return describe(config, backbone, name)
    except Exception as error:  # the file is the user's own program, which may raise anything
        if not blame(method, error) or isinstance(error, InputError):
            raise
        raise InputError(f"{blame(method, error)}: {type(error).__name__}: {error}") from error


def failure_file(workdir: Path, name: str, seed: int) -> Path:
    return workdir / "failures" / f"{name}-seed{seed}.txt"


def failure(workdir: Path, config: ConfigDict, name: str, seed: int, error: Exception) -> dict:
    """The entry of results.json for a run that broke off; its traceback goes to a file."""
    file = failure_file(workdir, name, seed)
    file.parent.mkdir(exist_ok=True)
    write_text(file, "".join(traceback.format_exception(error)))
    place = blame(for_method(config, name).method, error)
    line = f"{place}: " if place else ""
    line += f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    print(f"flex_jax: {name} seed {seed} failed: {line}", file=sys.stderr)
    return {"method": name, "seed": seed, "error": line}


def check_slots(config: ConfigDict, backbone: Backbone, methods: dict[str, Method]) -> None:
    """No slot may hold more grafted experts than a layer has."""
    experts = backbone.model.config.experts
    for name in config.methods:
        wanted = for_method(config, name).slot.experts
        if methods[name].grafts != "none" and wanted > experts:
            raise InputError(f"config.slot.experts is {wanted}: must be at most {experts}, the experts of a layer")


def build_federation(config: ConfigDict, backbone: Backbone, records: list[dict], seed: int) -> Federation:
    """Divide the records among clients and encode them."""
    data, length, tokenizer = config.data, config.sequence_length, backbone.tokenizer
    clients: list[ClientRecords] = partition(
        records,
        kind=data.partition,
        clients=config.clients,
        seed=seed,
        column=data.column,
        categories=data.categories,
        alpha=data.alpha,
        examples_per_client=data.examples_per_client,
        test_examples=data.test_examples,
    )
    train, test = (
        [encode_client(client.name, getattr(client, side), tokenizer, length) for client in clients]
        for side in ("train", "test")
    )
    prompts = [[encode_prompt(record, tokenizer, length) for record in client.test] for client in clients]
    held_out = HeldOut(
        [client.test for client in clients], prompts, evaluation_batches(test, config.evaluation.batch_size)
    )
    return Federation(train, held_out)


def claim(workdir: Path, config: ConfigDict) -> None:
    """Write config.json, or check that the one that is there says the same."""
    asked = json.loads(json.dumps(config.to_dict()))
    file = workdir / "config.json"
    if file.exists():
        held = json.loads(file.read_text(encoding="utf-8"))
        if held != asked:
            keys = sorted(key for key in held.keys() | asked.keys() if held.get(key) != asked.get(key))
            raise InputError(
                f"{workdir} holds a run of another config (different: {', '.join(keys)}); give another --workdir"
            )
        return
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(file, asked)


def load_results(workdir: Path) -> dict:
    """results.json as far as earlier calls of the same command came, or an empty one."""
    file = workdir / "results.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "transformers")
    versions = {"flex_jax": flex_jax.__version__} | {name: version(name) for name in packages}
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})"
    return {"runs": [], "summary": [], "versions": versions, "device": device}


def fairness(config: ConfigDict, results: dict) -> str:
    """What the methods had alike and what not, in a sentence for the report."""
    per_client = []
    for name in dict.fromkeys(run["method"] for run in results["runs"]):
        parameters = next(run["parameters"] for run in results["runs"] if run["method"] == name)
        rate = for_method(config, name).optimizer.learning_rate
        per_client.append(f"{name} {parameters['trained_per_client']:,} (learning rate {rate:g})")
    return (
        f"Every method ran {config.rounds} rounds of {config.local_steps} local steps, {config.batch_size} examples a "
        f"step, on the same clients, batches and seeds. Parameters trained by a client: {'; '.join(per_client)}."
    )
