"""SIGKILL at exact calls and at random instants: the same command ends as if nothing had happened."""

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.torture.battery import Case, Outcome
from tests.torture.programs import Lab, Program, Reference, at_call


def die() -> None:
    os._exit(137)


def kill_at_call(reference: Reference, target: str, number: int, after: bool, folder: Path) -> Outcome:
    workdir = folder / "run"
    fault = partial(at_call, target, number, die, workdir, after=after)
    Program(reference.command(workdir), folder / "killed", fault=fault).wait()
    return reference.resume(workdir, folder)


def kill_at_instant(reference: Reference, instants: tuple[float, ...], folder: Path) -> Outcome:
    """Kills the run, and then the one that resumes it."""
    workdir = folder / "run"
    for instant in instants:
        program = Program(reference.command(workdir), folder / "killed")
        time.sleep(instant * reference.facts["seconds"])
        program.kill()
        program.wait()
    return reference.resume(workdir, folder)


def cases(lab: Lab) -> Iterator[Case]:
    for name, reference in lab.references.items():
        random = lab.random("kills", name)
        points = [
            (target, number, after)
            for target, count in reference.facts["calls"].items()
            for number in range(1, count + 1)
            for after in (False, True)
        ]
        for target, number, after in random.sample(points, lab.count(8, 1)):
            when = "after" if after else "before"
            run = partial(kill_at_call, reference, target, number, after)
            yield Case(f"{name}: killed {when} call {number} of {target}", run, uses_jax=False)
        for number in (1, 1, 1, 2)[: lab.count(4, 0)]:
            instants = tuple(random.random() for _ in range(number))
            yield Case(
                f"{name}: killed at {instants[0]:.2f} of its time, {len(instants)} times",
                partial(kill_at_instant, reference, instants),
                uses_jax=False,
            )
