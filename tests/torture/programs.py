"""Commands of the package on a model of a few thousand weights: run with a fault, and compared with a sound run."""

import builtins
import contextlib
import hashlib
import io
import itertools
import json
import os
import pkgutil
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import load_file

# Imported before the first fork, so that a child needs no seconds for it. None of them begins with JAX's devices.
import flex_jax.experiment  # noqa: F401
import flex_jax.restored_run  # noqa: F401
from flex_jax import export, generate
from flex_jax.evaluation import answers
from flex_jax.main import main
from tests.program import arguments, read_lines
from tests.torture.battery import Found, Outcome, require

ROUNDS = 3
SETTINGS = ("--config.cohort=2", "--config.evaluation.every=1")
CALLS = (  # where a run writes: faults come at one of the calls of these
    "os:replace",
    "os:rename",
    "os:mkdir",
    "os:unlink",
    "os:fsync",
    "io:open",
    "flex_jax.federated.client_store:save_file",
    "orbax.checkpoint:CheckpointManager.save",
    "flex_jax.metrics_log:MetricsLog.write",
)


class Finished(NamedTuple):
    """What a command left on the terminal. `status` is minus the signal that ended it, as in subprocess."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The package's own lines."""
        return [line for line in self.err.splitlines() if line.startswith("flex_jax")]


class Program:
    """A command of the package in a forked process. `fault` runs in it before the command."""

    def __init__(
        self,
        words: list[str],
        log: Path,
        *,
        command: Callable[[list[str]], int] = main,
        fault: Callable[[], Any] = lambda: None,
        digest: Path | None = None,
    ):
        self._log, self.begun = log, time.monotonic()
        self.pid = os.fork()
        if self.pid:
            return
        status = 70
        try:
            signal.alarm(0)
            for number, suffix in ((1, ".out"), (2, ".err")):
                os.dup2(os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = (
                open(n, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False) for n in (1, 2)
            )
            fault()
            status = command(words)
            if status == 0 and digest:
                log.with_suffix(".digest").write_text(json.dumps(digest_states(digest)))
        except BaseException:
            traceback.print_exc()
            status = 1
        finally:
            os._exit(status)

    def wait(self, seconds: float = 150) -> Finished:
        """Waits for the end. A process that takes longer is killed: it hangs."""
        end = time.monotonic() + seconds
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise Found(Outcome.TRACEBACK, f"hangs: {self._log.with_suffix('.err').read_text()[-300:]}")
            time.sleep(0.02)
        out, err = (self._log.with_suffix(suffix).read_text(errors="replace") for suffix in (".out", ".err"))
        return Finished(os.waitstatus_to_exitcode(ended[1]), out, err)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def call(command: Callable[[list[str]], int], words: Iterable[object]) -> Finished:
    """Runs a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = command([str(word) for word in words])
        except Found:
            raise
        except SystemExit as error:
            status = int(error.code or 0)
        except BaseException:
            traceback.print_exc()
            status = 1
    return Finished(status, out.getvalue(), err.getvalue())


def at_call(
    target: str, number: int, action: Callable, workdir: Path, *, after: bool = False, onwards: bool = False
) -> None:
    """Makes the `number`-th call of a function (from 1), or all from that on, do `action` first, or afterwards.

    Calls of functions of `os` and `io` count if they write under `workdir`.
    """
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = pkgutil.resolve_name(":".join([module, ".".join(owners)]) if owners else module)
    function, calls = getattr(owner, name), itertools.count(1)

    def faulty(*args, **kwargs):
        counts = _writes(target, args, kwargs, workdir)
        this = next(calls) if counts else 0
        now = counts and (this >= number if onwards else this == number)
        if now and not after:
            action()
        result = function(*args, **kwargs)
        if now and after:
            action()
        return result

    setattr(owner, name, faulty)
    if target == "io:open":
        builtins.open = faulty  # type: ignore[assignment]


def _writes(target: str, args: tuple, kwargs: dict, workdir: Path) -> bool:
    if target.partition(":")[0] not in ("os", "io"):
        return True
    if target == "os:fsync":
        args = (os.readlink(f"/proc/self/fd/{args[0]}"),)
    if target == "io:open" and not set("wax+") & set(kwargs.get("mode", args[1] if len(args) > 1 else "r")):
        return False
    return any(str(item).startswith(str(workdir)) for item in args[:2])


def digest_arrays(arrays: Iterable[tuple[str, Any]]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(arrays):
        array = np.asarray(value)
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def digest_states(workdir: Path) -> dict[str, str]:
    """Returns digests of the newest state of every server and client of a work directory, read without the package."""
    digests = {}
    for run in sorted((workdir / "checkpoints").iterdir()):
        step = max(int(path.name) for path in (run / "server").iterdir() if path.name.isdigit())
        stored = ocp.StandardCheckpointer().restore(run.absolute() / "server" / str(step) / "default")
        flat = jax.tree_util.tree_flatten_with_path(stored)[0]
        digests[f"{run.name} server of round {step}"] = digest_arrays((str(path), leaf) for path, leaf in flat)
        newest = {file.name[:12]: file for file in sorted((run / "clients").glob("client*.safetensors"))}
        for client, file in newest.items():
            digests[f"{run.name} {client}"] = digest_arrays(load_file(file).items())
    return digests


def listing(workdir: Path) -> set[str]:
    """Returns the files of a work directory, with one name for the arrays of orbax, whose names are random."""
    files = (str(path.relative_to(workdir)) for path in workdir.rglob("*") if path.is_file())
    return {re.sub(r"/d/\w{32}$", "/d/*", name) for name in files} - {".lock"}


def contents(workdir: Path) -> dict[str, bytes]:
    """Returns all files with their bytes, but for those of locks."""
    files = {str(path.relative_to(workdir)): path for path in sorted(workdir.rglob("*")) if path.is_file()}
    return {name: file.read_bytes() for name, file in files.items() if file.name not in (".lock", ".reading")}


def scores(workdir: Path) -> tuple[Any, Any]:
    """Returns what results.json and metrics.jsonl say, without times."""
    results = json.loads((workdir / "results.json").read_text())
    runs = [{key: value for key, value in run.items() if key != "timing"} for run in results["runs"]]
    times = ("round_s", "train_tokens_per_s")
    lines = [{k: v for k, v in line.items() if k not in times} for line in read_lines(workdir / "metrics.jsonl")]
    return (runs, results["summary"]), lines


class Reference(NamedTuple):
    """A sound, uninterrupted run, by which others are judged."""

    methods: tuple[str, ...]
    more: tuple[str, ...]  # further flags
    folder: Path

    @property
    def workdir(self) -> Path:
        return self.folder / "run"

    @property
    def facts(self) -> dict[str, Any]:
        """The seconds of the run, the number of calls of each of CALLS, and the digests of the states."""
        return json.loads((self.folder / "facts.json").read_text())

    def command(self, workdir: Path, *more: str) -> list[str]:
        """Returns the command line of this run in another work directory."""
        methods = f"--config.methods={self.methods!r}"
        return arguments(self.folder.parent / "model", workdir, methods, *SETTINGS, *self.more, *more)

    def copy(self, folder: Path, round: int = ROUNDS) -> Path:
        """Returns a copy of the work directory, with all rounds done but not the last evaluation, or as after `round`.

        A finished run would not be read again.
        """
        source = self.workdir if round == ROUNDS else self.folder / f"round{round}"
        workdir = Path(shutil.copytree(source, folder / "run"))
        for name in ("results.json", "report.html", "summary.txt"):
            (workdir / name).unlink(missing_ok=True)
        return workdir

    def check(
        self, workdir: Path, finished: Finished, states: dict[str, str] | None = None, *, leftovers: bool = False
    ) -> None:
        """Raises `Found` unless a command has ended with exactly the results and states, and the files, of this run."""
        check_no_traceback(finished)
        require(finished.status == 0, Outcome.LOST, f"status {finished.status}: {finished.err[-500:]}")
        for name, got, wanted in zip(("results", "metrics"), scores(workdir), scores(self.workdir), strict=True):
            require(got == wanted, Outcome.WRONG, f"{name} differ: {difference(got, wanted)}")
        wanted = self.facts["states"]
        different = [key for key in wanted if states and states.get(key) != wanted[key]]
        require(not different, Outcome.WRONG, f"states differ: {different}")
        left = listing(workdir) ^ listing(self.workdir)
        require(leftovers or not left, Outcome.LOST, f"files left behind or missing: {sorted(left)[:6]}")

    def resume(self, workdir: Path, folder: Path, name: str = "resumed") -> Outcome:
        """Runs the command in a work directory again, and judges what it makes."""
        finished = Program(self.command(workdir), folder / name, digest=workdir).wait()
        digest = folder / f"{name}.digest"
        self.check(workdir, finished, json.loads(digest.read_text()) if digest.exists() else None)
        return Outcome.SURVIVED


class Lab(NamedTuple):
    """What all cases share."""

    folder: Path
    seed: int
    quick: bool
    references: dict[str, Reference]  # one of each method
    pair: Reference  # two methods
    other_seed: Reference

    def random(self, *names: object) -> Random:
        """Returns the random numbers of one purpose, so that a case alone draws what it draws among all."""
        return Random(" ".join(map(str, (self.seed, *names))))

    def count(self, full: int, quick: int) -> int:
        return quick if self.quick else full


def difference(got: Any, wanted: Any, place: str = "") -> str:
    """Returns the first place where two values of JSON's types differ."""
    if isinstance(got, dict) and isinstance(wanted, dict) and got.keys() == wanted.keys():
        return next((difference(got[key], wanted[key], f"{place}.{key}") for key in got if got[key] != wanted[key]), "")
    if isinstance(got, (list, tuple)) and isinstance(wanted, (list, tuple)) and len(got) == len(wanted):
        pairs = enumerate(zip(got, wanted, strict=True))
        return next((difference(*pair, f"{place}[{i}]") for i, pair in pairs if pair[0] != pair[1]), "")
    return f"{place}: {str(got)[:150]} instead of {str(wanted)[:150]}"


def check_no_traceback(finished: Finished) -> None:
    before, found, after = finished.err.partition("Traceback (most")
    require(not found, Outcome.TRACEBACK, f"{before[-200:]}{found}{after[:200]}\n...\n{after[-500:]}")


def check_refused(finished: Finished, words: str = "") -> Outcome:
    """Returns REFUSED if a command has ended with a clear line that has these words (a regular expression)."""
    check_no_traceback(finished)
    require(finished.status in (1, 2), Outcome.WRONG, f"not refused: status {finished.status}: {finished.err[-300:]}")
    require(finished.lines, Outcome.TRACEBACK, f"no line says why: {finished.err[-500:]}")
    text = "\n".join(finished.lines)
    require(re.search(words, text), Outcome.TRACEBACK, f"the line does not say {words!r}: {text[-300:]}")
    errors = [line for line in finished.lines if line.startswith("flex_jax: error:")]
    require(
        finished.status != 2 or len(errors) == 1, Outcome.TRACEBACK, f"{len(errors)} lines of errors: {text[-300:]}"
    )
    return Outcome.REFUSED


def make_reference(folder: Path, methods: tuple[str, ...], *more: str) -> Reference:
    """Makes a sound run, with a copy of its work directory after each round."""
    reference = Reference(methods, more, folder)
    workdir, counts = reference.workdir, Counter()
    folder.mkdir()

    def record() -> None:
        rounds = itertools.count(1)
        for target in CALLS:
            at_call(target, 1, partial(counts.update, [target]), workdir, onwards=True)
        copy = partial(shutil.copytree, workdir)
        at_call(
            "orbax.checkpoint:CheckpointManager.save",
            1,
            lambda: copy(folder / f"round{next(rounds)}"),
            workdir,
            after=True,
            onwards=True,
        )

    def command(words: list[str]) -> int:
        started = time.perf_counter()
        status = main(words)
        facts = {"seconds": time.perf_counter() - started, "calls": counts, "states": digest_states(workdir)}
        (folder / "facts.json").write_text(json.dumps(facts))
        return status

    finished = Program(reference.command(workdir), folder / "log", command=command, fault=record).wait()
    assert finished.status == 0, finished.err
    return reference


def models_read(program: str, workdir: Path, client: int, out: Path) -> tuple[Finished, Any]:
    """Runs generate or export, and returns in addition a digest of the model that it has read; None if it failed."""
    if program == "export":
        command = ["--workdir", workdir, "--client", client, "--format", "hf", "--out", out]
        finished = call(export.main, command)
        return finished, finished.status == 0 and digest_files(out)
    read, converse = [], answers.converse

    def watched(models, *args, **kwargs):
        read.extend(jax.tree_util.tree_leaves((models.server, models.clients)))
        return converse(models, *args, **kwargs)

    answers.converse = watched
    try:
        words = ["--workdir", workdir, "--client", client, "--prompt", "Name one.", "--max-new-tokens", 8]
        finished = call(generate.main, words)
    finally:
        answers.converse = converse
    return finished, finished.status == 0 and (
        digest_arrays((str(i), leaf) for i, leaf in enumerate(read)),
        finished.out,
    )


def digest_files(folder: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))).hexdigest()


@cache
def sound_models(program: str, reference: Reference, client: int) -> list[Any]:
    """Returns what `models_read` gives for a sound run after each of its rounds."""
    with tempfile.TemporaryDirectory() as out:
        return [
            models_read(program, reference.folder / f"round{number}", client, Path(out) / str(number))[1]
            for number in range(1, ROUNDS + 1)
        ]
