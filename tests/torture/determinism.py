"""The same numbers again: across restarts, on a slow disk, in other groups of clients; and the drift of bfloat16."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from flex_jax import generate, training
from flex_jax.main import main
from tests.torture.battery import Case, Outcome, require
from tests.torture.programs import Finished, Lab, Program, Reference, at_call, call, scores

ROUNDING = 1e-5  # of a loss, when XLA adds in another order
MOST_DRIFT = 0.05  # of a loss with weights in bfloat16, relative to float32


def again(reference: Reference, folder: Path) -> Outcome:
    return reference.resume(folder / "run", folder)


def other_process(reference: Reference, folder: Path) -> Outcome:
    """A process that was started, not forked, with another order of Python's sets."""
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    command = [sys.executable, "-m", "flex_jax.main", *reference.command(folder / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    reference.check(folder / "run", Finished(done.returncode, done.stdout, done.stderr))
    return Outcome.SURVIVED


def slow_disk(reference: Reference, target: str, folder: Path) -> Outcome:
    """A client's newest state is read, wherever it is, while the writer is behind."""
    workdir = folder / "run"
    fault = partial(at_call, target, 1, partial(time.sleep, 0.7), workdir, onwards=True)
    finished = Program(reference.command(workdir), folder / "slow", fault=fault, digest=workdir).wait()
    reference.check(workdir, finished, json.loads((folder / "slow.digest").read_text()))
    return Outcome.SURVIVED


def losses(workdir: Path) -> np.ndarray:
    return np.array([client["eval_loss"] for run in scores(workdir)[0][0] for client in run["clients"]])


def answers(workdir: Path) -> list[str]:
    return [
        example["prediction"]
        for run in scores(workdir)[0][0]
        for client in run["clients"]
        for example in client.get("examples", [])
    ]


def other_groups(reference: Reference, size: int, folder: Path) -> tuple[Outcome, str]:
    """All clients are evaluated in groups of `size`: the answers are the same, and the losses to rounding."""
    workdir = reference.copy(folder)
    groups = training.client_groups
    training.client_groups = lambda config: np.split(np.arange(config.clients), range(size, config.clients, size))
    try:
        finished = call(main, reference.command(workdir))
    finally:
        training.client_groups = groups
    require(finished.status == 0, Outcome.LOST, finished.err[-500:])
    drift = np.abs(losses(workdir) - losses(reference.workdir)).max()
    require(drift <= ROUNDING, Outcome.WRONG, f"a loss differs by {drift:.3g}")
    require(answers(workdir) == answers(reference.workdir), Outcome.WRONG, "an answer differs")
    return Outcome.SURVIVED, f"losses differ by {drift:.1g}"


def together(reference: Reference, folder: Path) -> Outcome:
    """Questions to all clients at once get the answers that each gets alone."""
    names = [client["name"] for client in scores(reference.workdir)[0][0][0]["clients"]]
    lines = [json.dumps({"prompt": f"Name {n}.", "client": name}) for n in range(3) for name in names[:3]]

    def ask(lines: list[str], name: str) -> list[dict]:
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        out = folder / f"{name}-answers.jsonl"
        words = ["--workdir", reference.workdir, "--prompts", folder / f"{name}.jsonl", "--out", out]
        finished = call(generate.main, words)
        require(finished.status == 0, Outcome.LOST, finished.err[-300:])
        return [json.loads(line)["choices"] for line in out.read_text().splitlines()]

    alone = [ask([line], f"alone{number}")[0] for number, line in enumerate(lines)]
    require(ask(lines, "together") == alone, Outcome.WRONG, "an answer differs")
    return Outcome.SURVIVED


def bfloat16(reference: Reference, folder: Path) -> tuple[Outcome, str]:
    finished = call(main, reference.command(folder / "run", "--config.model.dtype=bfloat16"))
    require(finished.status == 0, Outcome.LOST, finished.err[-500:])
    wanted = losses(reference.workdir)
    drift = (np.abs(losses(folder / "run") - wanted) / wanted).max()
    require(drift <= MOST_DRIFT, Outcome.WRONG, f"the loss drifts by {drift:.2%}")
    return Outcome.SURVIVED, f"with bfloat16 a client's loss drifts by at most {drift:.2%}"


def cases(lab: Lab) -> Iterator[Case]:
    if lab.quick:
        yield Case("flex: slow client files", partial(slow_disk, lab.references["flex"], SLOW[0]), uses_jax=False)
        return
    for name, reference in lab.references.items():
        yield Case(f"{name}: again", partial(again, reference), uses_jax=False)
        for target in SLOW:
            run = partial(slow_disk, reference, target)
            yield Case(f"{name}: slow {target.rpartition(':')[2]}", run, uses_jax=False)
        yield Case(f"{name}: bfloat16", partial(bfloat16, reference))
        for size in (1, 4):
            yield Case(f"{name}: in groups of {size}", partial(other_groups, reference, size))
    yield Case("flex: another process", partial(other_process, lab.references["flex"]), uses_jax=False)
    yield Case("ditto: questions together and alone", partial(together, lab.references["ditto"]))


SLOW = ("flex_jax.federated.client_store:save_file", "orbax.checkpoint:CheckpointManager.save")
