"""A run read back from its work directory, to generate with or to export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from flex_jax.config import default_config, for_method, validate
from flex_jax.errors import InputError
from flex_jax.federated.checkpoint import Checkpoints
from flex_jax.federated.method import Recipe
from flex_jax.federated.state import NO_CLIENTS, ClientState, Frozen, RoundState
from flex_jax.simulation import Backbone, any_run, load_backbone

SHARED = "shared"  # in the place of a client: the aggregated model, without anything personal


class Trained(NamedTuple):
    """One method with one seed, after its newest finished round."""

    name: str  # METHOD-seedN
    config: ConfigDict  # the method's own
    backbone: Backbone
    recipe: Recipe
    frozen: Frozen
    state: RoundState  # without clients
    directory: Path  # of its checkpoints
    fresh: Callable[[np.ndarray], ClientState]  # the rows that clients start with


def open_run(workdir: Path, method: str | None = None, seed: int | None = None) -> Trained:
    """The run of `method` and `seed` under a work directory, by default the first of each in its config.

    Raises InputError when there is no such run.
    """
    config = read_config(workdir)
    config.mesh.update(clients=1, fsdp=1, expert=1)  # a run over many devices is read back on one
    for name, value, known in (("--method", method, config.methods), ("--seed", seed, config.seeds)):
        if value is not None and value not in known:
            raise InputError(f"{name} {value}: the run in {workdir} has {', '.join(map(str, known))}")
    method = config.methods[0] if method is None else method
    seed = config.seeds[0] if seed is None else seed
    name = f"{method}-seed{seed}"
    directory = workdir / "checkpoints" / name
    if not directory.is_dir():
        raise InputError(f"{directory}: no checkpoint of this method and seed; the run has not come to them yet")
    own = for_method(config, method)
    backbone = load_backbone(config)
    run = any_run(own, backbone, jax.random.PRNGKey(seed))
    frozen, state, fresh = run.start
    with Checkpoints(directory, fresh, own.clients) as checkpoints:
        try:
            state = checkpoints.restore(state)
        except (KeyError, OSError, ValueError) as error:  # what orbax raises for lost files and for other shapes
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"{directory}: damaged, or not of the config.json beside it ({reason})") from error
    if state is None:
        raise InputError(f"{directory}: holds no finished round")
    return Trained(name, own, backbone, run.recipe, frozen, state, directory, fresh)


def read_config(workdir: Path) -> ConfigDict:
    """The config of the run in a work directory. Raises InputError when there is none to read."""
    file = workdir / "config.json"
    if not file.is_file():
        raise InputError(f"--workdir {workdir}: no run there (no config.json)")
    try:
        held = json.loads(file.read_text(encoding="utf-8"), object_hook=_lists_to_tuples)
    except ValueError as error:  # no JSON, no UTF-8
        raise InputError(f"{file}: broken JSON ({error})") from error
    config = default_config()
    try:
        with config.ignore_type():
            config.update(held)
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not the config of a run of this version ({error})") from error
    validate(config)
    return config


def _lists_to_tuples(values: dict) -> dict:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def client_names(workdir: Path) -> list[str]:
    """The names of a run's clients, by number; empty ones before any of its methods has finished. Raises InputError as
    `read_config`, and for a broken results.json."""
    clients = read_config(workdir).clients
    file = workdir / "results.json"
    if not file.is_file():
        return [""] * clients
    try:
        return [client["name"] for client in json.loads(file.read_text(encoding="utf-8"))["runs"][0]["clients"]]
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{file}: not the results of a run ({type(error).__name__}: {error})") from error


def parse_client(text: str, names: list[str]) -> int | None:
    """The number of the client of that number or else of that name, or None for the word "shared". Raises InputError
    for what is neither, or the name of several."""
    if text == SHARED:
        return None
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    if text and names.count(text) == 1:
        return names.index(text)
    known = ", ".join(f"{number} ({name})" if name else str(number) for number, name in enumerate(names))
    raise InputError(f"client {text!r}: must be {SHARED} or one of {known}")


def clients_of(trained: Trained, clients: list[int | None]) -> ClientState:
    """The rows of some clients, leading axis len(clients); of the shared model, whose client is None, no leaves.

    Raises InputError for the shared model of a method whose shared part is none, and for a damaged run.
    """
    if clients[0] is None:
        if not trained.recipe.method.common:
            raise InputError(f"client {SHARED}: {trained.name} shares a part of its adapters only; name a client")
        return NO_CLIENTS
    with Checkpoints(trained.directory, trained.fresh, trained.config.clients) as checkpoints:
        checkpoints.restore(trained.state)
        return checkpoints.load(np.array(clients))
