"""What a case is, what can become of it, and how cases run: each batch in a process of its own."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from enum import StrEnum
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

CASE_SECONDS = 120  # in the process of the case; one that forks programs has five times as much


class Outcome(StrEnum):
    """What became of a case. None of the last three may happen."""

    SURVIVED = "survived"  # the result is the right one
    REFUSED = "refused clearly"
    TRACEBACK = "tracebacks"  # also a program that hangs
    WRONG = "silently wrong"
    LOST = "lost"  # work that had been done cannot be gone on with


BAD = (Outcome.TRACEBACK, Outcome.WRONG, Outcome.LOST)


class Found(BaseException):
    """Ends a case with an outcome. As it is no Exception, the package does not handle it."""

    def __init__(self, outcome: Outcome, detail: str):
        self.outcome, self.detail = outcome, detail


def require(condition: object, outcome: Outcome, detail: str) -> None:
    if not condition:
        raise Found(outcome, detail)


class Case(NamedTuple):
    """One fault. `run` gets an empty folder; it returns an outcome, perhaps with a note for the reader, or raises."""

    name: str
    run: Callable[[Path], Outcome | tuple[Outcome, str]]
    uses_jax: bool = True  # in the process of the case itself. Others fork programs, for which JAX must not have begun.


class Report(NamedTuple):
    """The outcome of one case."""

    kind: str
    case: str
    outcome: Outcome
    detail: str


def run_case(case: Case, folder: Path) -> tuple[Outcome, str]:
    """Runs a case. Any error but `Found` counts as a traceback, so that nothing is taken for sound by mistake."""
    seconds = CASE_SECONDS * (1 if case.uses_jax else 5)

    def too_slow(_, frame):
        places = [
            f"{one.filename}:{one.lineno}" for one in traceback.extract_stack(frame) if "flex_jax" in one.filename
        ]
        raise Found(Outcome.TRACEBACK, f"hangs: not finished after {seconds} s, at {places[-1:]}")

    former = os.getcwd()
    signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(seconds)
    try:
        folder.mkdir(parents=True)
        found = case.run(folder)
        return found if isinstance(found, tuple) else (found, "")
    except Found as found:
        return found.outcome, found.detail
    except Exception:
        return Outcome.TRACEBACK, traceback.format_exc()[-700:]
    finally:
        signal.alarm(0)
        os.chdir(former)
        with contextlib.suppress(OSError):  # a case may have made a directory that nobody can remove
            shutil.rmtree(folder)


def _run_batch(kind: str, cases: list[Case], folder: Path, reports: Connection) -> None:
    log = os.open(folder.parent / f"{folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)  # libraries write there
    for number, case in enumerate(cases):
        reports.send(Report(kind, case.name, *run_case(case, folder / str(number))))


def batches(kinds: dict[str, list[Case]], size: int) -> Iterator[tuple[str, list[Case]]]:
    """Yields the cases of each kind in batches: those that use JAX many at a time, those that fork one by one."""
    for kind, cases in kinds.items():
        in_process = [case for case in cases if case.uses_jax]
        parts = min(2, -(-len(in_process) // size))
        yield from ((kind, in_process[part::parts]) for part in range(parts))
        yield from ((kind, [case]) for case in cases if not case.uses_jax)


def run_all(folder: Path, kinds: dict[str, list[Case]], workers: int) -> Iterator[Report]:
    """Runs all cases, `workers` batches at a time, and yields their reports as they come."""
    context = multiprocessing.get_context("fork")
    waiting = list(enumerate(batches(kinds, size=4)))
    running: dict[Connection, tuple] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            number, (kind, cases) = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_run_batch, args=(kind, cases, folder / f"batch{number}", sender))
            process.start()
            sender.close()
            running[receiver] = process, kind, [case.name for case in cases]
        for receiver in wait(list(running)):
            assert isinstance(receiver, Connection)
            process, kind, names = running[receiver]
            try:
                report = receiver.recv()
                names.remove(report.case)
                yield report
            except EOFError:
                process.join()
                del running[receiver]
                for name in names:  # the process died, as by a fault in native code
                    yield Report(kind, name, Outcome.TRACEBACK, f"its process ended with status {process.exitcode}")
