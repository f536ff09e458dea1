"""A run read back from its work directory, to generate with or to export."""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from flex_jax.building import Backbone, build_backbone, build_spec, resolve_method, start_without_grafting
from flex_jax.config import default_config, validate
from flex_jax.errors import InputError
from flex_jax.federated.checkpoint import Checkpoints
from flex_jax.federated.client import ClientModels
from flex_jax.federated.client_store import ClientStore
from flex_jax.federated.method import MethodSpec
from flex_jax.federated.state import NO_CLIENTS, Frozen, RoundState
from flex_jax.results import read_results

SHARED = "shared"  # the value of --client that means the aggregated model


class RestoredRun(NamedTuple):
    """One method with one seed, after its newest finished round."""

    name: str  # METHOD-seedN
    config: ConfigDict  # the method's own
    backbone: Backbone
    spec: MethodSpec
    frozen: Frozen
    state: RoundState  # without clients
    clients: ClientStore

    def models(self, client_ids: list[int]) -> ClientModels:
        """Returns the models of some clients. Raises InputError for one whose grafted experts are not stored yet."""
        untrained = [client for client in client_ids if not self.clients.newest[client]]
        if untrained and self.spec.method.grafts != "none":
            raise InputError(
                f"client {untrained[0]}: {self.name} has not trained it yet, so its grafted experts are not stored"
            )
        clients = self.clients.load(np.array(client_ids))
        return ClientModels(self.spec, self.frozen, self.state.server, clients)

    def shared_model(self) -> ClientModels:
        """Returns the aggregated model alone. Raises InputError if the method has none."""
        if not self.spec.method.has_global_model:
            raise InputError(f"client {SHARED}: {self.name} shares only a part of its adapters; name a client")
        return ClientModels(self.spec, self.frozen, self.state.server, NO_CLIENTS)


def open_run(workdir: Path, method: str | None = None, seed: int | None = None) -> RestoredRun:
    """Reads the run of `method` and `seed` in a work directory, by default the first of each in its config.

    Raises InputError if there is no such run, or if it is damaged.
    """
    config = read_config(workdir)
    config.mesh.update(clients=1, fsdp=1, expert=1)  # a run on many devices is read back on one
    for flag, value, choices in (("--method", method, config.methods), ("--seed", seed, config.seeds)):
        if value is not None and value not in choices:
            raise InputError(f"{flag} {value}: the run in {workdir} has {', '.join(map(str, choices))}")
    method, seed = method or str(config.methods[0]), int(config.seeds[0] if seed is None else seed)
    name = f"{method}-seed{seed}"
    directory = workdir / "checkpoints" / name
    if not directory.is_dir():
        raise InputError(f"{directory}: no checkpoint of this method and seed; the run has not reached them yet")
    resolved = resolve_method(config, method)
    backbone = build_backbone(config)
    spec = build_spec(resolved.config, backbone, resolved.method)
    first = start_without_grafting(resolved.config, spec, backbone, jax.random.PRNGKey(seed))
    with Checkpoints(directory, first.init_clients, config.clients) as checkpoints:
        try:
            state = checkpoints.restore(first.state)
        except (KeyError, OSError, ValueError) as error:  # what orbax raises for lost files and for other shapes
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"{directory}: damaged, or not of {workdir / 'config.json'} ({reason})") from error
    if state is None:
        raise InputError(f"{directory}: no finished round")
    return RestoredRun(name, resolved.config, backbone, spec, first.frozen, state, checkpoints.clients)


def read_config(workdir: Path) -> ConfigDict:
    """Reads the config of the run in a work directory. Raises InputError if there is none to read."""
    file = workdir / "config.json"
    if not file.is_file():
        raise InputError(f"--workdir {workdir}: no run there (no config.json)")
    try:
        values = json.loads(file.read_text(encoding="utf-8"), object_hook=_lists_to_tuples)
    except ValueError as error:  # no JSON, no UTF-8
        raise InputError(f"{file}: broken JSON ({error})") from error
    config = default_config()
    try:
        with config.ignore_type():
            config.update(values)
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not the config of a run of this version ({error})") from error
    validate(config)
    return config


def _lists_to_tuples(values: dict) -> dict:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def client_names(workdir: Path) -> list[str]:
    """Returns the names of the clients by id; they are empty until a method has finished with one seed."""
    num_clients = read_config(workdir).clients
    results = read_results(workdir)
    if results is None or not results["runs"]:
        return [""] * num_clients
    try:
        return [client["name"] for client in results["runs"][0]["clients"]]
    except (LookupError, TypeError) as error:
        raise InputError(f"{workdir / 'results.json'}: a client has no name ({type(error).__name__})") from error


def parse_client(text: str, names: list[str]) -> int | None:
    """Returns the id of the client with that id or unique name, or None for "shared". Raises InputError if neither."""
    if text == SHARED:
        return None
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    if text and names.count(text) == 1:
        return names.index(text)
    choices = ", ".join(f"{client} ({name})" if name else str(client) for client, name in enumerate(names))
    raise InputError(f"client {text!r}: must be {SHARED} or one of {choices}")
