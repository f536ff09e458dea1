"""The federated methods, by name. Each is a factory: its arguments are the method's hyperparameters."""

import inspect
import runpy
import traceback
import typing
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

from flex_jax.checks import HYPERPARAMETER, PLAIN, Check
from flex_jax.errors import InputError
from flex_jax.federated.method import Method
from flex_jax.methods.apfl import apfl
from flex_jax.methods.ditto import ditto
from flex_jax.methods.fdlora import fdlora
from flex_jax.methods.fedala import fedala
from flex_jax.methods.fedamole import fedamole
from flex_jax.methods.fedavg import fedavg
from flex_jax.methods.feddpa import feddpa
from flex_jax.methods.fedit import fedit
from flex_jax.methods.fedmoe import fedmoe
from flex_jax.methods.fedopt import fedadagrad, fedadam, fedavgm, fedyogi
from flex_jax.methods.fedper import fedper
from flex_jax.methods.fedprox import fedprox
from flex_jax.methods.fedrep import fedrep
from flex_jax.methods.fedsa_lora import fedsa_lora
from flex_jax.methods.ffa_lora import ffa_lora
from flex_jax.methods.flex import flex
from flex_jax.methods.flexlora import flexlora
from flex_jax.methods.flora import flora
from flex_jax.methods.hetlora import hetlora
from flex_jax.methods.local import local
from flex_jax.methods.scaffold import scaffold

MethodFactory = Callable[..., Method]
METHODS: dict[str, MethodFactory] = {
    factory.__name__: factory
    for factory in (
        *(apfl, ditto, fdlora, fedadagrad, fedadam, fedala, fedamole, fedavg, fedavgm, feddpa, fedit, fedmoe),
        *(fedper, fedprox, fedrep, fedsa_lora, fedyogi, ffa_lora, flex, flexlora, flora, hetlora, local, scaffold),
    )
}


def find_factory(name: str) -> MethodFactory:
    """Returns the factory of that name, or the function `attribute` of a file for "path/to/file.py:attribute".

    A file is run once, and again when its content has changed.
    """
    if name in METHODS:
        return METHODS[name]
    path, colon, attribute = name.rpartition(":")
    if not colon:
        raise InputError(f"method {name!r} is unknown: must be path/to/file.py:name or one of {', '.join(METHODS)}")
    if not Path(path).is_file():
        raise InputError(f"method {name!r}: {path} is no file")
    return _run_file(name, str(Path(path).resolve()), Path(path).read_bytes())


@cache
def _run_file(name: str, resolved: str, content: bytes) -> MethodFactory:
    path, _, attribute = name.rpartition(":")
    try:
        factory = runpy.run_path(path).get(attribute)
    except (Exception, SystemExit) as error:  # the file is the user's program, which may raise anything
        raise user_error(name, error) from error
    if not callable(factory) or isinstance(factory, Method):
        raise InputError(f"method {name!r}: {attribute} in {path} must be a function that returns a Method")
    return cast(MethodFactory, factory)


def make_method(name: str, hparams: Mapping[str, Any] | None = None, place: str = "hparams") -> Method:
    """Returns a method with these hyperparameters. Equal calls return the same object, so it compiles once.

    `name` is a key of METHODS or path/to/file.py:name; `place` is what error lines call the hyperparameters. Raises
    InputError for an unknown method, for whatever its file raises, and for wrong hyperparameters.
    """
    hparams = hparams or {}
    check_hparams(find_factory(name), hparams, place)
    try:
        return _make(name, find_factory(name), tuple(sorted(hparams.items())))
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


@cache
def _make(name: str, factory: MethodFactory, hparams: tuple[tuple[str, Any], ...]) -> Method:
    try:
        method = factory(**dict(hparams))
    except Exception as error:  # the factory may be the user's program, which may raise anything
        if isinstance(error, InputError) or name in METHODS:
            raise
        raise user_error(name, error) from error
    if not isinstance(method, Method):
        raise InputError(f"method {name!r}: the function must return a Method, not {type(method).__name__}")
    for part, field in ((method, "grafts"), (method.server, "extra_visibility")):
        allowed, value = typing.get_args(type(part).__annotations__[field]), getattr(part, field)
        if value not in allowed:
            raise InputError(f"method {name!r}: {field} is {value!r}: must be one of {', '.join(allowed)}")
    return method


def check_hparams(factory: MethodFactory, hparams: Mapping[str, Any], place: str) -> None:
    """Raises InputError unless the hyperparameters fit the factory's signature and annotations."""
    try:
        signature = inspect.signature(factory, eval_str=True)
    except NameError as error:  # a type that only the type checker knows
        raise InputError(f"{place}: an annotation of the method cannot be read ({error})") from error
    parameters = {
        name: p for name, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    for name, value in hparams.items():
        if name not in parameters:
            has = ", ".join(parameters) or "no hyperparameters"
            raise InputError(f"{place}.{name} is unknown: the method has {has}")
        for check in (_check_of(parameters[name].annotation), HYPERPARAMETER):
            if not check.accepts(value):
                raise InputError(f"{place}.{name} is {value!r}: must be {check.allowed}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in hparams:
            raise InputError(f"{place}.{name} is missing: the method has no default for it")


def _check_of(hint: Any) -> Check:
    for extra in getattr(hint, "__metadata__", ()):
        if isinstance(extra, Check):
            return extra
    return PLAIN.get(typing.get_origin(hint) or hint, HYPERPARAMETER)


def user_frame(name: str, error: BaseException) -> str:
    """Returns the last line of a user's method file that an error came through, as "path, line 3", or ""."""
    path, line = name.rpartition(":")[0], None
    for frame in traceback.extract_tb(error.__traceback__):
        line = frame.lineno if frame.filename == path else line
    if isinstance(error, SyntaxError) and error.filename == path:
        line = error.lineno
    return f"{path}, line {line}" if path and line else path


def user_error(name: str, error: BaseException) -> InputError:
    """Returns the error line for whatever a user's own method file raised."""
    return InputError(f"{user_frame(name, error)}: {type(error).__name__}: {error}")


__all__ = ["METHODS", "Method", "check_hparams", "find_factory", "make_method", "user_error", "user_frame"]
