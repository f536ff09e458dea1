"""Two processes on one work directory, and readers beside a run."""

import json
import os
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.torture.battery import Case, Outcome, require
from tests.torture.programs import Lab, Program, Reference, at_call, check_refused, models_read, sound_models


def slow_run(reference: Reference, folder: Path, seconds: float, target: str) -> tuple[Program, Path]:
    """Starts a run that waits before each call of `target`, and returns when it waits for the first time."""
    waits, workdir = folder / "waits", folder / "run"

    def wait() -> None:
        waits.touch()
        time.sleep(seconds)

    fault = partial(at_call, target, 1, wait, workdir, onwards=True)
    program = Program(reference.command(workdir), folder / "first", fault=fault, digest=workdir)
    while not waits.exists() and not os.waitid(os.P_PID, program.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.02)
    return program, workdir


def second(reference: Reference, more: tuple[str, ...], stopped: bool, folder: Path) -> Outcome:
    """A second run is refused at once, with a line about the first, which ends as if there had been no second."""
    first, workdir = slow_run(reference, folder, 4, "flex_jax.metrics_log:MetricsLog.write")
    if stopped:
        first.kill(signal.SIGSTOP)
    refused = Program(reference.command(workdir, *more), folder / "second").wait(60)
    first.kill(signal.SIGCONT)
    finished = first.wait()
    check_refused(refused, rf"(?s)(?=.*{first.pid})(?=.*{re.escape(socket.gethostname())})(?=.*since.*\d\d:\d\d)")
    reference.check(workdir, finished, json.loads((folder / "first.digest").read_text()))
    return Outcome.REFUSED


def race(reference: Reference, number: int, folder: Path) -> Outcome:
    """Two commands start at the same instant: one runs, the other is refused."""
    workdir = folder / "run"
    programs = [Program(reference.command(workdir), folder / f"{number}-{i}", digest=workdir) for i in range(2)]
    ended = [program.wait() for program in programs]
    winners = [i for i, finished in enumerate(ended) if finished.status == 0]
    require(len(winners) == 1, Outcome.WRONG, f"statuses {[finished.status for finished in ended]}")
    check_refused(ended[1 - winners[0]], "in use|another process")
    states = json.loads((folder / f"{number}-{winners[0]}.digest").read_text())
    reference.check(workdir, ended[winners[0]], states)
    return Outcome.REFUSED


def dead_holder(reference: Reference, folder: Path) -> Outcome:
    """A process that was killed blocks nobody."""
    first, workdir = slow_run(reference, folder, 60, "flex_jax.metrics_log:MetricsLog.write")
    first.kill()
    first.wait()
    return reference.resume(workdir, folder)


def readers(reference: Reference, program: str, between: str, client: int, folder: Path) -> tuple[Outcome, str]:
    """generate or export in a loop beside a run: each reads one finished round whole, also if it is slow."""
    workdir, ready = folder / "run", folder / "ready"

    def loop(_: list[str]) -> int:
        sound, tried = sound_models(program, reference, client), []
        ready.touch()
        at_call(between, 1, partial(time.sleep, 1), workdir, onwards=True)
        while not (folder / "done").exists() or not tried:
            finished, states = models_read(program, workdir, client, folder / f"out{len(tried)}")
            number = sound.index(states) + 1 if states in sound and not finished.status else None
            said = re.search(r"after round (\d+)", finished.err)
            tried.append((finished, number, said and int(said[1])))
        (folder / "tried.json").write_text(json.dumps(tried))
        return 0

    reader = Program([], folder / "reader", command=loop)
    while not ready.exists():
        time.sleep(0.1)
    first, _ = slow_run(reference, folder, 3, "orbax.checkpoint:CheckpointManager.save")
    finished = first.wait()
    (folder / "done").touch()
    looped = reader.wait()
    require(looped.status == 0, Outcome.TRACEBACK, looped.err[-500:])
    tried = json.loads((folder / "tried.json").read_text())
    for (status, _, err), number, said in tried:
        require("Traceback (most" not in err, Outcome.TRACEBACK, err[-800:])
        early = status == 2 and re.search("not trained|no finished round|no checkpoint|no run there", err)
        require(
            number or early, Outcome.LOST if status else Outcome.WRONG, f"status {status}, of no round: {err[-300:]}"
        )
        require(said in (None, number), Outcome.WRONG, f"says round {said}, has read round {number}")
    states = json.loads((folder / "first.digest").read_text())
    reference.check(workdir, finished, states, leftovers=True)  # what a reader held is swept at the next start
    rounds = Counter(number for _, number, _ in tried if number)
    require(rounds, Outcome.LOST, f"none of {len(tried)} readings found a round")
    return Outcome.SURVIVED, "readings by round: " + ", ".join(f"{n}: {rounds[n]}" for n in sorted(rounds))


def cases(lab: Lab) -> Iterator[Case]:
    flex = lab.references["flex"]
    if lab.quick:
        return
    yield Case("the same command", partial(second, flex, (), False), uses_jax=False)
    yield Case(
        "another config", partial(second, flex, ("--config.optimizer.learning_rate=0.5",), False), uses_jax=False
    )
    yield Case("the first is stopped", partial(second, flex, (), True), uses_jax=False)
    for number in range(3):
        yield Case(f"at the same instant, {number}", partial(race, flex, number), uses_jax=False)
    yield Case("a dead holder", partial(dead_holder, flex), uses_jax=False)
    for program in ("generate", "export"):
        for between in (
            "flex_jax.federated.client_store:ClientStore.load",
            "orbax.checkpoint:CheckpointManager.restore",
        ):
            client = sorted(flex.workdir.glob("checkpoints/*/clients/*"))[-1].name[6:12]
            run = partial(readers, flex, program, between, int(client))
            yield Case(f"{program} in a loop, slow before {between.rpartition('.')[2]}", run, uses_jax=False)
