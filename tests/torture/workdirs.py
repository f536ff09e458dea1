"""Damaged work directories: the right results, or one line that names the file, and nothing else changes."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

from flex_jax import export, generate
from flex_jax.main import main
from tests.torture.battery import Case, Outcome, require
from tests.torture.programs import (
    Lab,
    Reference,
    call,
    check_no_traceback,
    check_refused,
    contents,
    difference,
    digest_states,
    models_read,
    scores,
    sound_models,
)

FILES = (  # by a pattern; what a version of the package does not write is not damaged
    "config.json",
    "inputs.json",
    "results.json",
    "metrics.jsonl",
    "clients.json",
    "checkpoints/*/clients/client*",
    "checkpoints/*/round*.json",
    "checkpoints/*/server/*/_CHECKPOINT_METADATA",
    "checkpoints/*/server/*/default/_METADATA",
    "checkpoints/*/server/*/default/manifest.ocdbt",
    "checkpoints/*/server/*/default/d/*",
    "checkpoints/*/server/*/default/ocdbt.process_0/d/*",
    "checkpoints/*/server/3",
    "checkpoints/*/server",
    "checkpoints/*/clients",
)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    remove(path)
    make(path)


def other_json(path: Path, content: str) -> None:
    replaced(path, lambda path: path.write_text(content))


def shorten(path: Path, share: float) -> None:
    if path.is_file():
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    else:
        remove(path)


def double(path: Path) -> None:
    if path.is_file():
        path.write_bytes(path.read_bytes() * 2)


def drop_line(path: Path) -> None:
    if path.is_file():
        lines = path.read_bytes().split(b"\n")
        path.write_bytes(b"\n".join(lines[: len(lines) // 2] + lines[len(lines) // 2 + 1 :]))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": remove,
    "empty": lambda path: other_json(path, ""),
    "half": partial(shorten, share=0.5),
    "without its last byte": lambda path: shorten(path, 1 - 1e-9),
    "twice": double,
    "without a line": drop_line,
    "a directory": lambda path: replaced(path, Path.mkdir),
    "a pipe": lambda path: replaced(path, os.mkfifo),
    "a link to itself": lambda path: replaced(path, lambda path: path.symlink_to(path)),
    "garbage": lambda path: replaced(path, lambda path: path.write_bytes(Random(0).randbytes(500))),
    "{}": partial(other_json, content="{}"),
    "[]": partial(other_json, content="[]\n"),
    "3": partial(other_json, content="3\n"),
    "a nest": partial(other_json, content="[" * 100_000),
    "a long number": partial(other_json, content='{"runs": ' + "9" * 10_000 + "}\n"),
    "runs of null": partial(other_json, content='{"runs": [null], "summary": 3, "versions": null, "device": 1}\n'),
    "null values": partial(other_json, content='{"run": null, "round": null, "client": null, "method": []}\n'),
}


def pick(workdir: Path, pattern: str, which: float) -> Path | None:
    paths = sorted(workdir.glob(pattern))
    return paths[int(which * len(paths))] if paths else None


def damaged(reference: Reference, pattern: str, which: float, damage: str, program: str, folder: Path) -> Outcome:
    """Runs a program in a work directory with one damage, and judges what comes of it."""
    finished_before = pattern == "results.json"  # others damage a run that goes on
    workdir = Path(shutil.copytree(reference.workdir, folder / "run")) if finished_before else reference.copy(folder)
    path = pick(workdir, pattern, which)
    if path is None:
        return Outcome.SURVIVED
    DAMAGES[damage](path)
    before = contents(workdir)
    if program == "train":
        finished = call(main, reference.command(workdir))
    else:
        finished, states = models_read(program, workdir, 0, folder / "out")
    check_no_traceback(finished)
    if finished.status:
        if finished.status == 2:
            require(contents(workdir) == before, Outcome.WRONG, "refused, but the work directory has changed")
        return check_refused(finished, "run/|workdir|checkpoint")
    if program != "train":
        sound = sound_models(program, reference, 0)
        told = re.search(r"takes the place|after round \d of", finished.err + finished.out)
        require(states in (sound if told else sound[-1:]), Outcome.WRONG, f"another model: {finished.err[-300:]}")
        return Outcome.SURVIVED
    wanted, found = scores(reference.workdir), scores(workdir)
    require(found[0] == wanted[0], Outcome.WRONG, f"other results: {difference(found[0], wanted[0])}")
    told = [line for line in finished.lines if "metrics.jsonl" in line]
    require(found[1] == wanted[1] or told, Outcome.WRONG, f"other metrics: {difference(found[1], wanted[1])}")
    require(pattern == "results.json" or digest_states(workdir) == reference.facts["states"], Outcome.WRONG, "states")
    return Outcome.SURVIVED


def other_rate(reference: Reference, folder: Path) -> Outcome:
    """Without its config.json a run is still that of its learning rate."""
    workdir = reference.copy(folder)
    (workdir / "config.json").unlink()
    return check_refused(call(main, reference.command(workdir, "--config.optimizer.learning_rate=0.5")))


def other_data(lab: Lab, change: str, folder: Path) -> Outcome:
    """A data file, the checkpoint or a method's file changed since the run, finished or not."""
    records = [{"instruction": f"Say {i}", "response": f"yes {i}", "who": f"c{i % 4}"} for i in range(48)]
    data, model, method = folder / "data.jsonl", folder / "model", folder / "mine.py"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    shutil.copytree(lab.folder / "model", model)
    method.write_text("from flex_jax import Method\n\ndef mine():\n    return Method(ownership=((r'.*', 'shared'),))\n")
    flags = [f"--config.data.path={data}", "--config.data.column=who", "--config.rounds=1", "--config.local_steps=1"]
    words = lab.pair.command(folder / "run", *flags, f"--config.model.path={model}")
    words = [word for word in words if "config.methods" not in word] + [f"--config.methods='{method}:mine',"]
    words = [word for word in words if not (word.startswith("--config.model.path") and str(model) not in word)]
    first = call(main, words)
    require(first.status == 0, Outcome.TRACEBACK, first.err[-500:])
    if "unfinished" in change:
        (folder / "run/results.json").unlink()
    if "data" in change:
        data.write_text(data.read_text().replace("yes 7", "no 7"))
    elif "checkpoint" in change:
        content = bytearray((model / "model.safetensors").read_bytes())
        content[-3] ^= 1
        (model / "model.safetensors").write_bytes(content)
    else:
        method.write_text(method.read_text().replace("'shared'", "'personal'"))
    return check_refused(call(main, words), "data|model|mine")


def link_followed(reference: Reference, folder: Path) -> Outcome:
    """A link where a temporary file used to be is not written through."""
    workdir, victim = reference.copy(folder), folder / "victim"
    victim.write_text("untouched")
    for name in ("report.html", "results.json", "summary.txt", "metrics.jsonl", "config.json", "inputs.json"):
        (workdir / f".{name}.tmp").symlink_to(victim)
    finished = call(main, reference.command(workdir))
    check_no_traceback(finished)
    require(victim.read_text() == "untouched", Outcome.WRONG, "a file outside of the work directory was written")
    return Outcome.SURVIVED


def untrusted(lab: Lab, program: str, folder: Path) -> Outcome:
    """A work directory names a Python file as its method: neither generate nor export runs it."""
    workdir, mark = lab.references["flex"].copy(folder), folder / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\ndef flex():\n    pass\n")
    config = json.loads((workdir / "config.json").read_text())
    config |= {"overrides": {"flex": {"method": f"{folder}/evil.py:flex"}}}
    (workdir / "config.json").write_text(json.dumps(config))
    words = ["--workdir", workdir, "--client", 0]
    more = ["--prompt", "a"] if program == "generate" else ["--format", "hf", "--out", folder / "out"]
    finished = call({"generate": generate, "export": export}[program].main, [*words, *more])
    require(not mark.exists(), Outcome.WRONG, "the file was run")
    return check_refused(finished, "evil.py")


def cases(lab: Lab) -> Iterator[Case]:
    random = lab.random("workdirs")
    points = [(pattern, damage) for pattern in FILES for damage in DAMAGES]
    for pattern, damage in random.sample(points, lab.count(100, 4)):
        name = random.choice(list(lab.references))
        program = random.choice(("train", "train", "generate", "export"))
        run = partial(damaged, lab.references[name], pattern, random.random(), damage, program)
        yield Case(f"{name}: {pattern} {damage}, {program}", run)
    if lab.quick:
        return
    yield Case("config.json deleted, and another rate", partial(other_rate, lab.references["ditto"]))
    for change in ("data", "checkpoint", "method", "data, unfinished", "checkpoint, unfinished", "method, unfinished"):
        yield Case(f"{change}: changed since the run", partial(other_data, lab, change))
    yield Case("links in the place of temporary files", partial(link_followed, lab.references["flex"]))
    yield from (
        Case(f"a method of its own, {program}", partial(untrusted, lab, program)) for program in ("generate", "export")
    )
