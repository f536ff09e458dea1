"""A run read back from its work directory, to generate with or to export."""

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from flex_jax.building import Backbone, build_backbone, build_spec, resolve_method, start_without_grafting
from flex_jax.config import for_method
from flex_jax.data.columns import listing
from flex_jax.data.partition import SHARED
from flex_jax.errors import InputError
from flex_jax.federated.checkpoint import Checkpoints
from flex_jax.federated.client import ClientModels
from flex_jax.federated.method import MethodSpec
from flex_jax.federated.state import NO_CLIENTS, Frozen, RoundState
from flex_jax.terminal import tell
from flex_jax.workdir import (
    check_inputs,
    method_inputs,
    model_inputs,
    read_client_names,
    read_config,
    read_inputs,
    run_identity,
)


class RestoredRun(NamedTuple):
    """One method with one seed, after its newest finished round, with the states of some clients."""

    name: str  # METHOD-seedN
    config: ConfigDict  # the method's own
    backbone: Backbone
    spec: MethodSpec
    frozen: Frozen
    state: RoundState  # its clients are those of `client_ids`, in this order
    client_ids: list[int]

    def models(self, client_ids: list[int]) -> ClientModels:
        """Returns the models of some of the clients that were read."""
        rows = np.array([self.client_ids.index(client) for client in client_ids])
        clients = jax.tree.map(lambda leaf: leaf[rows], self.state.clients)
        return ClientModels(self.spec, self.frozen, self.state.server, clients)

    def shared_model(self) -> ClientModels:
        """Returns the aggregated model alone. Raises InputError if the method has none."""
        if not self.spec.method.has_global_model:
            raise InputError(f"client {SHARED}: {self.name} shares only a part of its adapters; name a client")
        return ClientModels(self.spec, self.frozen, self.state.server, NO_CLIENTS)


def open_run(
    workdir: Path,
    method: str | None = None,
    seed: int | None = None,
    client_ids: Iterable[int] = (),
    trust: Path | None = None,
) -> RestoredRun:
    """Reads the run of `method` and `seed` in a work directory, by default the first of each in its config.

    The states of the clients are of the same round as the server's, also while the run goes on in another process. A
    method's own file is run only if it is the one to `trust`: a work directory may come from anybody.

    Raises:
        InputError: there is no such run, it is damaged, its checkpoint or method file is another one now, or a client
            that grafts experts has not trained yet.
    """
    config = read_config(workdir)
    for flag, value, choices in (("--method", method, config.methods), ("--seed", seed, config.seeds)):
        if value is not None and value not in choices:
            raise InputError(f"{flag} {value}: the run in {workdir} has {', '.join(map(str, choices))}")
    method, seed = method or str(config.methods[0]), int(config.seeds[0] if seed is None else seed)
    name = f"{method}-seed{seed}"
    directory = workdir / "checkpoints" / name
    if not (directory / "server").is_dir():
        raise InputError(f"{directory}: no checkpoint of this method and seed; the run has not reached them yet")
    own = for_method(config, method)
    check_trust(workdir, own.method, trust)
    read = model_inputs(own) | method_inputs(method, own)
    check_inputs(workdir, read, lambda name: name.startswith(("model.path", f"method {method}: ")))
    identity = run_identity(method, own, seed, read_inputs(workdir), read_client_names(workdir))
    resolved = resolve_method(config, method)
    config.mesh.update(clients=1, fsdp=1, expert=1)  # a run on many devices is read back on one
    backbone = build_backbone(config)
    spec = build_spec(resolved.config, backbone, resolved.method)
    first = start_without_grafting(resolved.config, spec, backbone, jax.random.PRNGKey(seed))
    ids = sorted(set(client_ids))
    with Checkpoints(directory, first.init_clients, config.clients, identity, read_only=True) as checkpoints:
        state = checkpoints.read(first.state, ids)
        if state is None:
            raise InputError(f"{directory}: no finished round")
        untrained = [client for client in ids if not checkpoints.clients.newest[client]]
    if untrained and spec.method.grafts != "none":
        raise InputError(f"client {untrained[0]}: {name} has not trained it yet, so its grafted experts are not stored")
    if untrained:
        tell(f"{name} has not trained {listing(map(str, untrained))} yet, by index: their personal parts are the first")
    return RestoredRun(name, resolved.config, backbone, spec, first.frozen, state, ids)


def check_trust(workdir: Path, method: str, trust: Path | None) -> None:
    """Raises InputError if a method is a file outside of the package, and not the one to `trust`."""
    file, colon, _ = method.rpartition(":")
    if colon and (trust is None or Path(file).resolve() != trust.resolve()):
        raise InputError(
            f"{workdir / 'config.json'}: its method is a program, {file}: read it, then give --trust {file} to run it"
        )


def client_label(client: int | None, names: list[str]) -> str:
    """Returns what output calls a client, "finance (#0)", or the aggregated model, "shared"."""
    return SHARED if client is None else f"{names[client]} (#{client})"


def _numbers(name: str) -> list[str]:
    return re.findall(r"\d+", unicodedata.normalize("NFKC", name))


def parse_client(text: str, names: list[str]) -> int | None:
    """Returns the id of the client that `text` means, or None for "shared".

    It is a name, "#2", or 2 if no name has a number, or the name with index 2 has that one, such as client_2. Raises
    InputError for anything else.
    """
    if text == SHARED:
        return None
    if names.count(text) == 1:
        return names.index(text)
    index = text.removeprefix("#")
    is_index = index in map(str, range(len(names)))
    if is_index and (text != index or _numbers(names[int(index)]) == [index] or not any(map(_numbers, names))):
        return int(index)
    choices = listing(client_label(client, names) for client in range(len(names)))
    hint = f"; #{index} is the client with that index" if is_index else ""
    raise InputError(f"client {text!r:.60}: must be {SHARED} or one of {choices}{hint}")
