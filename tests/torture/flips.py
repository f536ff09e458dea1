"""Flipped bits and exchanged files: told and mended by the round before, or refused by name, at whatever reads next."""

import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from flex_jax.main import main
from tests.torture.battery import Case, Outcome, require
from tests.torture.programs import (
    ROUNDS,
    Lab,
    Reference,
    call,
    check_no_traceback,
    check_refused,
    digest_states,
    models_read,
    sound_models,
)

Damage = Callable[[Path], str]  # damages a work directory, and returns the name of the file


def newest(workdir: Path, client: int | None = None) -> list[Path]:
    """Returns the newest files of all clients, or of one."""
    files = sorted(workdir.glob("checkpoints/*/clients/client*.safetensors"))
    last = {(file.parent, file.name[:12]): file for file in files}
    return [file for (_, name), file in last.items() if client in (None, int(name[6:]))]


def flip(pattern: str, position: float, which: float, bit: int, workdir: Path) -> str:
    """Flips a bit of a file of the newest round."""
    places = {"label": f"checkpoints/*/round{ROUNDS:06d}.json"}
    place = places.get(pattern, f"checkpoints/*/server/{ROUNDS}/{pattern}")
    files = newest(workdir) if pattern == "clients" else sorted(workdir.glob(place))
    files = [file for file in files if file.is_file() and file.stat().st_size]
    sizes = np.cumsum([file.stat().st_size for file in files])
    file = files[int(np.searchsorted(sizes, which * sizes[-1], side="right"))]  # the larger, the likelier
    content = bytearray(file.read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    file.write_bytes(content)
    return file.name


def truncate(which: float, share: float, workdir: Path) -> str:
    files = newest(workdir) + sorted(f for f in workdir.glob(f"checkpoints/*/server/{ROUNDS}/**/*") if f.is_file())
    file = files[int(which * len(files))]
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    return file.name


def exchange(source: Callable[[Path], Path], client: int, workdir: Path) -> str:
    """Puts another file in the place of a client's."""
    (file,) = newest(workdir, client)
    shutil.copyfile(source(workdir), file)
    return file.name


def overwrite(value: float, client: int, workdir: Path) -> str:
    """Writes a number into all arrays of a client. The file stays one of safetensors, with what it says of itself."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    (file,) = newest(workdir, client)
    with safe_open(file, "np") as opened:
        arrays, label = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()
    for array in arrays.values():
        if np.isfinite(value) or np.issubdtype(array.dtype, np.floating):
            array[...] = value
    save_file(arrays, file, label)
    return file.name


def resume(reference: Reference, damage: Damage, folder: Path) -> Outcome:
    """The command goes on: it ends as the sound run, and says that a round was lost, or names what is damaged."""
    workdir = reference.copy(folder)
    damage(workdir)
    finished = call(main, reference.command(workdir))
    if finished.status:
        return check_refused(finished, "safetensors|server|checkpoints")
    reference.check(workdir, finished, digest_states(workdir))
    return Outcome.SURVIVED


def read(reference: Reference, program: str, damage: Damage, client: int, folder: Path) -> Outcome:
    """A reader of a damaged run uses the states of one sound round and says which, or names the file."""
    workdir = reference.copy(folder)
    damage(workdir)
    finished, states = models_read(program, workdir, client, folder / "out")
    if finished.status:
        return check_refused(finished, "safetensors|server|checkpoints")
    check_no_traceback(finished)
    sound = sound_models(program, reference, client)
    require(states in sound, Outcome.WRONG, f"client {client} is of no round: {finished.err[-200:]}")
    told = re.search(r"takes the place|after round \d of", finished.err + finished.out)
    require(states == sound[-1] or told, Outcome.WRONG, f"client {client} is of an older round, without a word")
    return Outcome.SURVIVED


def older(reference: Reference, client: int) -> list[Path]:
    """Returns a client's files of the rounds before the last."""
    return [file for number in range(1, ROUNDS) for file in newest(reference.folder / f"round{number}", client)]


def damages(lab: Lab, reference: Reference, client: int, other_seed: Path) -> Iterator[tuple[str, Damage]]:
    random = lab.random("flips")
    for number in range(lab.count(50, 1)):
        yield (
            f"bit {number} of a client",
            partial(flip, "clients", random.random(), random.random(), random.randrange(8)),
        )
    for number in range(lab.count(50, 1)):
        spot = random.random(), random.random(), random.randrange(8)
        yield f"bit {number} of the server's arrays", partial(flip, "**/d/*", *spot)
    if lab.quick:
        return
    for pattern in ("label", "**/_METADATA", "_CHECKPOINT_METADATA", "**/manifest.ocdbt", "**/_sharding"):
        for number in range(2):
            spot = random.random(), random.random(), random.randrange(8)
            yield f"bit {number} of {pattern}", partial(flip, pattern, *spot)
    for number in range(8):
        yield f"truncation {number}", partial(truncate, random.random(), random.random())
    yield (
        "another client's file",
        partial(
            exchange,
            lambda workdir: [file for file in newest(workdir) if file not in newest(workdir, client)][0],
            client,
        ),
    )
    yield "another seed's file", partial(exchange, lambda _: newest(other_seed)[0], client)
    yield "an older round's file", partial(exchange, lambda _: older(reference, client)[0], client)
    for value in (np.nan, np.inf, 1e30, 0.0):
        yield f"{value} in a row", partial(overwrite, value, client)


def cases(lab: Lab) -> Iterator[Case]:
    for number, name in enumerate(lab.references):
        reference = lab.references[name]
        last = [file for file in newest(reference.workdir) if f"round{ROUNDS:06d}" in file.name]
        client = next((c for c in (int(f.name[6:12]) for f in last) if older(reference, c)), 0)
        for i, (title, damage) in enumerate(damages(lab, reference, client, lab.other_seed.workdir)):
            if i % 4 == number or lab.quick:  # each damage with one of the methods
                yield Case(f"{name}: {title}", partial(resume, reference, damage))
                if i % 3 == 0:
                    program = "generate" if i % 2 else "export"
                    yield Case(f"{name}: {title}, {program}", partial(read, reference, program, damage, client))
