"""A run read back from its work directory, to generate with or to export."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from flex_jax.building import Backbone, build_backbone, build_spec, resolve_method, start_without_grafting
from flex_jax.config import for_method
from flex_jax.errors import InputError
from flex_jax.federated.checkpoint import Checkpoints
from flex_jax.federated.client import ClientModels
from flex_jax.federated.method import MethodSpec
from flex_jax.federated.state import NO_CLIENTS, Frozen, RoundState
from flex_jax.results import read_results
from flex_jax.workdir import check_inputs, method_inputs, model_inputs, read_config, read_inputs, run_identity

SHARED = "shared"  # the value of --client that means the aggregated model


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
    workdir: Path, method: str | None = None, seed: int | None = None, client_ids: Iterable[int] = ()
) -> RestoredRun:
    """Reads the run of `method` and `seed` in a work directory, by default the first of each in its config.

    The states of the clients are of the same round as the server's, also while the run goes on in another process.

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
    read = model_inputs(own) | method_inputs(method, own)
    check_inputs(workdir, read, lambda name: name.startswith(("model.path", f"method {method}: ")))
    identity = run_identity(method, own, seed, read_inputs(workdir))
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
    return RestoredRun(name, resolved.config, backbone, spec, first.frozen, state, ids)


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
