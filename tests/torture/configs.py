"""Random command lines: each value is taken as given, or refused with its key; huge ones before anything is built."""

import ast
import resource
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from flex_jax.config import SCHEMA
from flex_jax.errors import InputError
from flex_jax.main import parse
from tests.program import ROOT
from tests.torture.battery import Case, Outcome, require
from tests.torture.programs import Lab, Program, check_refused

TEXTS = [
    "",
    " ",
    "tiny",
    "a,b",
    "('a',)",
    "None",
    "nan",
    "1e400",
    "0x10",
    "1_000",
    "\x00",
    "'",
    "9" * 10_000,
    "é",
    "[" * 5000,
]
NUMBERS = [0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**30, 0.5, 1e-300, 1e300, -0.0, float("inf"), float("nan"), 1.0]
HUGE = {
    "evaluation.max_new_tokens": 10**9,
    "batch_size": 10**8,
    "sequence_length": 10**9,
    "evaluation.batch_size": 10**9,
    "lora.rank": 10**9,
    "clients": 10**9,
}


def random_value(random: Random, default: Any) -> Any:
    """Returns a value that is often one like the default."""
    if type(default) in (int, float) and random.random() < 0.5:
        return random.randint(1, 4) if isinstance(default, int) else random.random()
    if default == () or random.random() < 0.3:
        return default
    kind = random.randrange(6)
    if kind < 2:
        return random.choice(NUMBERS)
    if kind == 2:
        return random.choice(TEXTS)
    if kind == 3:
        return random.choice((True, False))
    if kind == 4:
        return tuple(random.choice(["flex", "ditto", "a b", ""]) for _ in range(random.randrange(3)))
    return tuple(random.choice(NUMBERS) for _ in range(random.randrange(4)))


def same(found: Any, text: str, given: Any) -> bool:
    """Whether a value of the config is the one that was given; a text may also be what Python reads in it."""
    try:
        read = ast.literal_eval(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        read = text
    words = tuple(part.strip() for part in text.split(","))
    wanted = [given, text, read, (read,), (given,), words, text.strip()]
    wanted += [text.lower() in ("true", "1")] if text.lower() in ("true", "false", "0", "1") else []
    wanted += [tuple(read)] if isinstance(read, list) else []
    return any(found == one and isinstance(found, bool) == isinstance(one, bool) for one in wanted)


def command_line(flags: list[tuple[str, Any]], folder: Path) -> Outcome:
    words = [f"--config.{key}={value}" for key, value in flags]
    last = dict(flags)
    try:
        config, _ = parse(["--config", f"{ROOT}/configs/default.py", "--workdir", str(folder / "run"), *words])
    except InputError as error:
        named = [key for key, _ in flags if key.split(".")[-1] in str(error) or key.rpartition(".")[0] in str(error)]
        require(named, Outcome.TRACEBACK, f"{words} refused without the key: {str(error)[:300]}")
        return Outcome.REFUSED
    if method := last.pop("method", ""):  # becomes the only one of methods
        last["methods"] = (str(method).rpartition(":")[2],)
    for key, value in last.items():
        found = config
        for part in key.split("."):
            found = found[part]
        require(same(found, str(value), value), Outcome.WRONG, f"{words}: config.{key} is {found!r}")
    return Outcome.SURVIVED


def huge(lab: Lab, key: str, folder: Path) -> Outcome:
    """A value that no machine can hold is refused before training, in little memory and time."""
    words = lab.references["flex"].command(folder / "run", f"--config.{key}={HUGE[key]}")
    words = [w for w in words if not w.startswith(f"--config.{key}=") or w.endswith(str(HUGE[key]))]
    limit = 16 * 2**30
    fault = partial(resource.setrlimit, resource.RLIMIT_AS, (limit, limit))
    return check_refused(Program(words, folder / "huge", fault=fault).wait(60), key.split(".")[-1])


def cases(lab: Lab) -> Iterator[Case]:
    random = lab.random("configs")
    keys = {key: entry.default for key, entry in SCHEMA.items()}
    keys |= {"hparams.ditto.lambda_": 0.1, "overrides.flex.lora.rank": 8, "overrides.flex.optimizer.learning_rate": 0.1}
    for number in range(lab.count(500, 50)):
        names = random.choices(list(keys), k=random.randint(1, 3))
        names += names[: number % 5 == 0]  # the same key twice: the last one counts
        flags = [(key, random_value(random, keys[key])) for key in names]
        yield Case(f"command line {number}", partial(command_line, flags))
    if not lab.quick:
        yield from (Case(f"{key}={HUGE[key]}", partial(huge, lab, key), uses_jax=False) for key in HUGE)
