"""SIGTERM and SIGHUP: the run ends in good order with status 143, and the same command ends as if nothing had been."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.torture.battery import Case, Found, Outcome, require
from tests.torture.programs import Finished, Lab, Program, Reference, at_call, check_no_traceback

STAGES = {
    "building": "flex_jax.experiment:build_backbone",
    "compiling": "flex_jax.federated.federated_round:CompiledRound.compile",
    "training": "flex_jax.metrics_log:MetricsLog.write",
    "saving": "orbax.checkpoint:CheckpointManager.save",
    "saving clients": "flex_jax.federated.client_store:save_file",
    "evaluating": "flex_jax.training:score",
}


def check_stopped(finished: Finished, number: signal.Signals) -> None:
    """Raises `Found` unless a stopped command had status 143, and one line on how to resume. It may have been done."""
    check_no_traceback(finished)
    if finished.status:
        require(finished.status == 143, Outcome.TRACEBACK, f"status {finished.status} after {number.name}")
        lines = [line for line in finished.lines if "resume" in line and number.name in line]
        require(len(lines) == 1, Outcome.TRACEBACK, f"no line on how to resume: {finished.err[-300:]}")


def stop_at_stage(reference: Reference, number: signal.Signals, stage: str, folder: Path) -> Outcome:
    workdir = folder / "run"

    def send() -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.2)

    fault = partial(at_call, STAGES[stage], 1, send, workdir)
    finished = Program(reference.command(workdir), folder / "stopped", fault=fault).wait()
    require(finished.status, Outcome.WRONG, f"{number.name} was ignored")
    check_stopped(finished, number)
    return reference.resume(workdir, folder)


def stop_at_instant(reference: Reference, number: signal.Signals, instant: float, folder: Path) -> Outcome:
    workdir = folder / "run"
    handled = folder / "handled"

    def watch() -> None:
        """Notes when the command has its handler: a signal before that finds the handler of a fork, not of a start."""
        default = signal.getsignal(number)

        def wait() -> None:
            while signal.getsignal(number) == default:
                time.sleep(0.01)
            handled.touch()

        threading.Thread(target=wait, daemon=True).start()

    program = Program(reference.command(workdir), folder / "stopped", fault=watch)
    limit = time.monotonic() + 5
    while not handled.exists() and time.monotonic() < limit:
        time.sleep(0.01)
    time.sleep(instant * reference.facts["seconds"])
    program.kill(number)
    check_stopped(program.wait(), number)
    return reference.resume(workdir, folder)


def stop_import(reference: Reference, seconds: float, folder: Path) -> Outcome:
    """Stops a command while it imports, in a process that has imported nothing before."""
    workdir = folder / "run"
    command = [sys.executable, "-m", "flex_jax.main", *reference.command(workdir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.terminate()
    out, err = process.communicate(timeout=120)
    check_stopped(Finished(process.returncode, out, err), signal.SIGTERM)
    return reference.resume(workdir, folder)


def stop_twice(reference: Reference, folder: Path) -> Outcome:
    """A second signal ends a command that waits for a slow disk at once."""
    workdir, saving = folder / "run", folder / "saving"

    def slow() -> None:
        saving.touch()
        time.sleep(30)

    fault = partial(at_call, STAGES["saving clients"], 1, slow, workdir)
    program = Program(reference.command(workdir), folder / "stopped", fault=fault)
    while not saving.exists():
        time.sleep(0.05)
    program.kill(signal.SIGTERM)
    time.sleep(1)
    program.kill(signal.SIGTERM)
    try:
        program.wait(5)
    except Found as found:
        raise Found(Outcome.TRACEBACK, "a second signal does not end the command at once") from found
    return reference.resume(workdir, folder)


def cases(lab: Lab) -> Iterator[Case]:
    random = lab.random("signals")
    numbers = (signal.SIGTERM, signal.SIGHUP)
    names = list(lab.references)
    for stage in list(STAGES)[: lab.count(len(STAGES), 0)]:
        name, number = random.choice(names), random.choice(numbers)
        run = partial(stop_at_stage, lab.references[name], number, stage)
        yield Case(f"{name}: {number.name} while {stage}", run, uses_jax=False)
    for _ in range(lab.count(8, 1)):
        name, number, instant = random.choice(names), random.choice(numbers), random.random()
        run = partial(stop_at_instant, lab.references[name], number, instant)
        yield Case(f"{name}: {number.name} at {instant:.2f} of its time", run, uses_jax=False)
    if not lab.quick:
        for seconds in (1.0, 1.7, 2.5):
            run = partial(stop_import, lab.references["flex"], seconds)
            yield Case(f"flex: SIGTERM {seconds} s after its start", run, uses_jax=False)
        yield Case("flex: SIGTERM twice", partial(stop_twice, lab.references["flex"]), uses_jax=False)
