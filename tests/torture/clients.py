"""Clients that drop out, return what is not finite or of another structure, or have no examples."""

import json
import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from flex_jax.main import main
from tests.program import arguments
from tests.torture.battery import Case, Outcome, require
from tests.torture.programs import Finished, Lab, call, check_no_traceback, check_refused

METHOD = """
import jax, jax.numpy as jnp
from flex_jax import Method
from flex_jax.federated.method import ClientResult, ClientRule, Upload, delta

def bad():
    def make_result(context, trained):
        client, moved, personal = context.state.extra["client"], delta(context, trained), trained.personal
        {body}
        return ClientResult(Upload(moved), personal, context.state.extra)

    rule = ClientRule(init_extra=lambda shared, client: {{"client": jnp.float32(client)}}, make_result=make_result)
    return Method(ownership=((r".*", "shared"),), client=rule)
"""
BODIES = {  # what the client does, by the name of the fault
    "NaN of client 1": "moved = jax.tree.map(lambda x: jnp.where(client == 1, jnp.nan, x), moved)",
    "inf of client 2": "moved = jax.tree.map(lambda x: jnp.where(client == 2, jnp.inf, x), moved)",
    "NaN in one number": "moved = jax.tree.map(lambda x: x.at[..., 0, 0].mul(jnp.where(client, 1, jnp.nan)), moved)",
    "NaN of all": "moved = jax.tree.map(lambda x: x * jnp.nan, moved)",
}
STRUCTURES = {
    "an upload without an array": "moved = {}",
    "an upload of another shape": "moved = jax.tree.map(lambda leaf: leaf[None], moved)",
    "a result of another type": "return 3",
    "a state of another structure": 'return ClientResult(Upload(moved), {"new": client}, {})',
    "an error": 'raise RuntimeError("of the user")',
    "a NaN that Python sees": "moved = None",
}
AGGREGATIONS = ("mean", "geometric_median", "median", "trimmed_mean")
AVAILABILITY = {  # the file, and whether a run can go on with it
    "drop out and return": ("[0, 1]\n[2, 3]\n[1, 3]\n", True),
    "one client for ever": ("[0, 1, 2, 3]\n[3, 0]\n", True),
    "too few": ("[0, 1]\n[2]\n", False),
    "nobody": ("[]\n", False),
    "an unknown client": ("[0, 9]\n", False),
    "twice the same": ("[0, 0]\n", False),
    "text": ('["0", "1"]\n', False),
    "half a file": ("[0, 1]\n[0, ", False),
    "a nest": ("[" * 100_000, False),
    "a long number": (f"[0, {'9' * 10_000}]\n", False),
    "no file": (None, False),
}


def run_method(lab: Lab, folder: Path, body: str, *more: str) -> tuple[Finished, Path]:
    (folder / "bad.py").write_text(METHOD.format(body=body))
    words = [f"--config.methods='{folder}/bad.py:bad',", *more]
    return call(main, arguments(lab.folder / "model", folder / "run", *words)), folder / "run"


def not_finite(lab: Lab, name: str, more: tuple[str, ...], folder: Path) -> Outcome:
    """Uploads that are not finite are left out and counted; if there are too few others, the run stops at once."""
    finished, workdir = run_method(lab, folder, BODIES[name], "--config.evaluation.every=1", *more)
    check_no_traceback(finished)
    if name == "NaN of all":
        require(finished.status == 1, Outcome.WRONG, f"status {finished.status}: {finished.err[-300:]}")
        check_refused(finished, "(?i)finite|diverged|nan")
        return Outcome.REFUSED
    if finished.status:
        return check_refused(finished, "(?i)finite|nan")
    (run,) = json.loads((workdir / "results.json").read_text())["runs"]
    losses = [client["eval_loss"] for client in run["clients"]]
    require(all(loss is not None and math.isfinite(loss) for loss in losses), Outcome.WRONG, f"losses {losses}")
    told = finished.out + finished.err + json.dumps(run) + (workdir / "metrics.jsonl").read_text()
    require(re.search("(?i)finite|left out|dropped|skipped|excluded", told), Outcome.WRONG, "nobody is told")
    return Outcome.SURVIVED


def structure(lab: Lab, name: str, folder: Path) -> Outcome:
    """A method that returns something else is refused with the file, and its line where there is one."""
    finished, workdir = run_method(lab, folder, STRUCTURES[name])
    require(finished.status, Outcome.WRONG, "accepted")
    require(not (workdir / "checkpoints").exists() or finished.status == 1, Outcome.WRONG, "refused after it had begun")
    return check_refused(finished, r"bad\.py|bad")


def available(lab: Lab, name: str, folder: Path) -> Outcome:
    text, sound = AVAILABILITY[name]
    file = folder / "available.jsonl"
    if text is not None:
        file.write_text(text)
    words = [f"--config.availability={file}", "--config.cohort=2", "--config.methods='fedavg',"]
    finished = call(main, arguments(lab.folder / "model", folder / "run", *words))
    if not sound:
        return check_refused(finished, "available.jsonl")
    require(finished.status == 0, Outcome.LOST, finished.err[-500:])
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    for number in range(3):
        rounds = text.splitlines()
        wanted = set(json.loads(rounds[number % len(rounds)]))
        found = {line["client"] for line in lines if line["round"] == number and "train_loss" in line} - {None}
        require(found <= wanted and len(found) == 2, Outcome.WRONG, f"round {number}: {found} of {wanted}")
    return Outcome.SURVIVED


def too_few_examples(lab: Lab, examples: int, folder: Path) -> Outcome:
    """One of four clients has fewer records than can be divided into training and test."""
    sizes = [9, 9, 9, examples]
    records = [
        {"instruction": f"Say {client} {number}", "response": "yes", "client": f"c{client}"}
        for client, size in enumerate(sizes)
        for number in range(size)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = [f"--config.data.path={folder}/data.jsonl", "--config.data.column=client", "--config.methods='fedavg',"]
    finished = call(main, arguments(lab.folder / "model", folder / "run", *words))
    return check_refused(finished, "c3|clients=")


def diverging(lab: Lab, rate: str, folder: Path) -> Outcome:
    """A learning rate with which the loss leaves what can be counted: told, never a plausible number."""
    words = [f"--config.optimizer.learning_rate={rate}", "--config.methods='fedavg','local'"]
    finished = call(main, arguments(lab.folder / "model", folder / "run", *words))
    check_no_traceback(finished)
    if finished.status == 2:
        return check_refused(finished)
    results = json.loads((folder / "run/results.json").read_text())
    losses = [client["eval_loss"] for run in results["runs"] for client in run["clients"]]
    sound = all(loss is not None for loss in losses)
    require(sound or re.search("(?i)diverged|finite|nan", finished.err), Outcome.WRONG, f"losses {losses}, no line")
    require(sound or "diverged" in finished.out + finished.err, Outcome.WRONG, "not called diverged")
    return Outcome.SURVIVED if sound else Outcome.REFUSED


def cases(lab: Lab) -> Iterator[Case]:
    if lab.quick:
        yield Case("NaN of client 1, mean", partial(not_finite, lab, "NaN of client 1", ()))
        return
    for aggregation in AGGREGATIONS:
        for name in ("NaN of client 1", "inf of client 2") if aggregation == "mean" else ("NaN of client 1",):
            flags = (f"--config.server.aggregation={aggregation}",)
            yield Case(f"{name}, {aggregation}", partial(not_finite, lab, name, flags))
    for name in ("NaN in one number", "NaN of all"):
        yield Case(name, partial(not_finite, lab, name, ()))
    yield Case(
        "NaN of client 1, int8", partial(not_finite, lab, "NaN of client 1", ("--config.client.compression=int8",))
    )
    yield from (Case(name, partial(structure, lab, name)) for name in STRUCTURES)
    yield from (Case(f"available: {name}", partial(available, lab, name)) for name in AVAILABILITY)
    for examples in (0, 1, 2):
        yield Case(f"{examples} examples", partial(too_few_examples, lab, examples))
    yield from (Case(f"learning rate {rate}", partial(diverging, lab, rate)) for rate in ("1e3", "1e15", "1e38"))
