"""The federated methods, by name: one line each. `find_method` knows those of a user's own files as well."""

import runpy
import traceback
from functools import cache
from pathlib import Path

from flex_jax.errors import InputError
from flex_jax.federated.method import Method
from flex_jax.methods import (
    apfl,
    ditto,
    fdlora,
    fedala,
    fedamole,
    fedavg,
    feddpa,
    fedit,
    fedmoe,
    fedopt,
    fedper,
    fedprox,
    fedrep,
    fedsa_lora,
    ffa_lora,
    flex,
    flexlora,
    flora,
    hetlora,
    local,
    scaffold,
)

METHODS: dict[str, Method] = {
    "apfl": apfl.METHOD,
    "ditto": ditto.METHOD,
    "fdlora": fdlora.METHOD,
    "fedadagrad": fedopt.FEDADAGRAD,
    "fedadam": fedopt.FEDADAM,
    "fedala": fedala.METHOD,
    "fedamole": fedamole.METHOD,
    "fedavg": fedavg.METHOD,
    "fedavgm": fedopt.FEDAVGM,
    "feddpa": feddpa.METHOD,
    "fedit": fedit.METHOD,
    "fedmoe": fedmoe.METHOD,
    "fedper": fedper.METHOD,
    "fedprox": fedprox.METHOD,
    "fedrep": fedrep.METHOD,
    "fedsa_lora": fedsa_lora.METHOD,
    "fedyogi": fedopt.FEDYOGI,
    "ffa_lora": ffa_lora.METHOD,
    "flex": flex.METHOD,
    "flexlora": flexlora.METHOD,
    "flora": flora.METHOD,
    "hetlora": hetlora.METHOD,
    "local": local.METHOD,
    "scaffold": scaffold.METHOD,
}


@cache  # equal methods compile once
def find_method(name: str) -> Method:
    """The method of that name, or the object `attribute` of a Python file for "path/to/file.py:attribute".

    Raises InputError when there is no such method, and for whatever the file raises itself, with its line.
    """
    if name in METHODS:
        return METHODS[name]
    path, colon, attribute = name.rpartition(":")
    if not colon:
        raise InputError(f"method {name!r} is unknown: must be path/to/file.py:name or one of {', '.join(METHODS)}")
    if not Path(path).is_file():
        raise InputError(f"method {name!r}: {path} is no file")
    try:
        found = runpy.run_path(path).get(attribute)
    except (Exception, SystemExit) as error:  # the file is the user's own program, which may raise anything
        raise InputError(f"{blame(name, error) or path}: {type(error).__name__}: {error}") from error
    if not isinstance(found, Method):
        raise InputError(f"method {name!r}: {attribute} in {path} must be a flex_jax.methods.Method")
    return found


def blame(name: str, error: BaseException) -> str:
    """The last line of a method's own file that an error came through, as "path, line 3"; empty where there is none,
    and for the methods of this package."""
    path, line = name.rpartition(":")[0], None
    for frame in traceback.extract_tb(error.__traceback__):
        line = frame.lineno if frame.filename == path else line
    if isinstance(error, SyntaxError) and error.filename == path:
        line = error.lineno
    return f"{path}, line {line}" if path and line else path


__all__ = ["METHODS", "Method", "blame", "find_method"]
