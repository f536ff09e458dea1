"""A whole experiment: build, plan, run every method with every seed, report."""

import traceback
from importlib.metadata import version
from pathlib import Path

import jax
from ml_collections import ConfigDict

from flex_jax.building import (
    Backbone,
    Federation,
    PreparedMethod,
    build_backbone,
    build_federation,
    check_method_names,
    load_data_of,
    plan_row,
    prepare_method,
    resolve_method,
)
from flex_jax.command import raise_if_stopped
from flex_jax.config import name_methods, validate
from flex_jax.errors import Diverged, FailedRuns, InputError
from flex_jax.federated.checkpoint import check_stored
from flex_jax.federated.cohort import read_availability
from flex_jax.files import write_text
from flex_jax.fingerprint import digest_json
from flex_jax.locks import lock_workdir
from flex_jax.memory import check_plan
from flex_jax.methods import user_frame
from flex_jax.metrics_log import missing_rounds, read_metrics
from flex_jax.reporting.page import write_report
from flex_jax.reporting.tables import plan_table, summary_table
from flex_jax.results import Failure, Results, read_results, summarise, write_results
from flex_jax.terminal import tell, visible
from flex_jax.training import run_one
from flex_jax.workdir import Workdir, check, inputs_of, run_identity, take_up

PACKAGES = ("flex_jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers")


def run(config: ConfigDict, workdir: Path) -> Results:
    """Runs a config's methods x seeds under `workdir`, and returns the content of results.json.

    Runs that are finished in the work directory are not repeated, and an interrupted one resumes from its newest
    checkpoint. A run that fails does not stop the others: it is in results.json under "failures", its traceback is
    under failures/, and the same command tries it again.

    Raises:
        InputError: a mistake in the config, the data or the checkpoint; a work directory of another config or of other
            inputs, or one that another process uses.
        FailedRuns: a run failed; raised at the end.
        OSError: results cannot be written; raised after all runs.
    """
    config = config.copy_and_resolve_references()
    name_methods(config)
    validate(config)
    check_method_names(config)
    resolved = [resolve_method(config, name) for name in config.methods]
    if config.availability:
        read_availability(config.availability, config.clients, config.cohort or config.clients)
    with lock_workdir(workdir):
        data = load_data_of(config)
        inputs = inputs_of(config, resolved, data)
        check(workdir, config, inputs)
        backbone = build_backbone(config)
        federations = {seed: build_federation(config, backbone, data, seed) for seed in config.seeds}
        methods = [prepare_method(method, backbone) for method in resolved]
        for method in methods:
            check_plan(method.name, method.plan)
        results = read_results(workdir) or new_results()
        client_names = names_of_clients(federations)
        identities = {
            (method.name, seed): run_identity(method.name, method.config, seed, inputs, client_names)
            for method in methods
            for seed in config.seeds
        }
        check_results(workdir, results, identities)
        for (name, seed), identity in identities.items():
            check_stored(workdir / "checkpoints" / f"{name}-seed{seed}", identity)
        opened = take_up(workdir, config, inputs, client_names)
        for line in (data.summary, *federations[config.seeds[0]].notes):
            tell(f"data: {line}")
        print(plan_table([plan_row(method) for method in methods]), flush=True)
        run_all(methods, backbone, federations, opened, results)
        notes = [comparison_note(config, methods), *([config.note] if config.note else [])]
        report(config, opened, results, notes, data.summary)
    if failures := results["failures"]:
        first = f"{failures[0]['method']} seed {failures[0]['seed']}: {failures[0]['error']}"
        runs = len(config.methods) * len(config.seeds)
        raise FailedRuns(f"{len(failures)} of {runs} runs failed ({first}): see {workdir / 'failures'}")
    return results


def names_of_clients(federations: dict[int, Federation]) -> list[str]:
    """Returns the names of the clients by id. Raises InputError if they are not the same for all seeds."""
    (first, names), *others = {
        seed: [client.name for client in data.train] for seed, data in federations.items()
    }.items()
    for seed, other in others:
        if other != names:
            raise InputError(f"the clients of seeds {first} and {seed} have other names: give each a run of its own")
    return names


def run_all(
    methods: list[PreparedMethod], backbone: Backbone, federations: dict[int, Federation], workdir: Workdir, results
) -> None:
    """Runs what is not finished yet, and puts it into `results` and results.json."""
    results["failures"], finished = [], {(entry["method"], entry["seed"]) for entry in results["runs"]}
    if finished >= {(method.name, seed) for method in methods for seed in federations}:
        tell(f"all {len(finished)} runs in {workdir.path} are finished: nothing was run")
        return
    unwritten = None
    for method in methods:
        jax.clear_caches()  # drops the programs of the last method: a process can hold only so many
        for seed, federation in federations.items():
            raise_if_stopped()
            if (method.name, seed) in finished:
                continue
            try:
                entry = run_one(method, backbone, federation, seed, workdir)
            except Exception as error:  # whatever breaks one method must not lose the others
                results["failures"].append(record_failure(workdir.path, method, seed, error))
            else:
                failure_file(workdir.path, method.name, seed).unlink(missing_ok=True)
                results["runs"].append(entry)
            results["summary"] = summarise(results["runs"])
            try:
                write_results(workdir.path, results)
                unwritten = None
            except OSError as error:  # the other runs may find space
                unwritten = error
                tell(f"{error.filename}: {error.strerror}: written after the next run")
    if unwritten:
        raise unwritten


def report(config: ConfigDict, workdir: Workdir, results: Results, notes: list[str], data: str) -> None:
    """Writes report.html and summary.txt, and prints the summary."""
    metrics = read_metrics(workdir.metrics.path)
    for entry in results["runs"]:
        run = f"{entry['method']}-seed{entry['seed']}"
        if missing := missing_rounds(metrics, run, config.rounds):
            tell(
                f"{workdir.metrics.path} has lost {len(missing)} of {config.rounds} rounds of {run}: its "
                "learning curve has a gap; scores and bytes do not depend on it"
            )
    page = workdir.path / "report.html"
    write_report(page, results, metrics, notes=notes, config=config.to_dict(), data=data)
    write_text(workdir.path / "summary.txt", f"{summary_table(results)}\n")
    print(summary_table(results))
    print(visible(f"report: {page}"))


def check_results(workdir: Path, results: Results, identities: dict[tuple[str, int], dict]) -> None:
    """Raises InputError if results are of another config or other inputs. Tells if they are of other packages.

    `identities` are those of the runs, by method and seed.
    """
    for run in results["runs"]:
        name, seed = run["method"], run["seed"]
        if run["identity"] != digest_json(identities.get((name, seed))):
            raise InputError(
                f"{workdir / 'results.json'}: {name} seed {seed} is of another config or other inputs: move the file "
                "away, or give another --workdir"
            )
    now = new_results()
    before = results["versions"] | {"device": results["device"]}
    changed = [
        f"{name} {value}, now {found}"
        for name, value in before.items()
        if (found := (now["versions"] | {"device": now["device"]}).get(name)) != value
    ]
    if changed:
        tell(f"the results in {workdir} began with {'; '.join(changed)}")


def failure_file(workdir: Path, name: str, seed: int) -> Path:
    return workdir / "failures" / f"{name}-seed{seed}.txt"


def record_failure(workdir: Path, method: PreparedMethod, seed: int, error: Exception) -> Failure:
    """Writes the traceback of a run that failed to a file, and returns its entry of results.json."""
    file = failure_file(workdir, method.name, seed)
    try:
        file.parent.mkdir(exist_ok=True)
        write_text(file, "".join(traceback.format_exception(error)))
    except OSError as unwritable:  # such as a full disk, which may be what broke the run
        tell(f"{unwritable.filename}: {unwritable.strerror}")
    frame = "" if isinstance(error, (Diverged, InputError, OSError)) else user_frame(method.config.method, error)
    line = f"{frame}: " if frame else ""
    diverged = isinstance(error, Diverged)
    line += "" if diverged else f"{type(error).__name__}: "
    line += str(error).partition("\n")[0]
    tell(f"{method.name} seed {seed} failed: {line}")
    return {"method": method.name, "seed": seed, "error": line, "diverged": diverged}


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
