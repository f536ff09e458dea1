"""The states of all clients of a run: one file for each client, read when its cohort needs it.

A client that never took part has no file: its state is its first one. So neither memory nor the time of a round depends
on the number of clients.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from flex_jax.errors import InputError
from flex_jax.federated.state import NO_CLIENTS, ClientState


def named_leaves(state: ClientState) -> dict[str, np.ndarray]:
    """Returns the arrays of a client state by their paths, such as "personal/layers/moe/slot/gate"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


class ClientStore:
    """The newest state of every client: on the device, on its way to the disk, or on the disk.

    init_clients: client ids [C] -> their first states.
    """

    def __init__(self, directory: Path, init_clients: Callable[[np.ndarray], ClientState], num_clients: int):
        directory.mkdir(parents=True, exist_ok=True)
        self.newest = np.zeros(num_clients, np.int32)  # the finished rounds when a client was written; 0: no file
        self._directory = directory
        self._init_clients = init_clients
        self._cached: tuple[np.ndarray, ClientState] = np.zeros(0, np.int32), NO_CLIENTS  # the last cohort
        self._pending: dict[int, dict[str, np.ndarray]] = {}  # client -> state that another thread is writing

    def cache(self, client_ids: np.ndarray, states: ClientState) -> None:
        """Makes `states` the newest of the clients `client_ids` [C]. They stay on the device."""
        self._cached = np.asarray(client_ids, np.int32), states

    def load(self, client_ids: np.ndarray) -> ClientState:
        """Returns the newest states of clients [C], leading axis C. Raises InputError for a lost or damaged file."""
        client_ids, (cached_ids, cached_states) = np.asarray(client_ids, np.int32), self._cached
        if np.array_equal(client_ids, cached_ids):
            return cached_states
        position_in_cache = {client: position for position, client in enumerate(cached_ids.tolist())}
        pending = self._pending  # read before `newest`, which `commit` sets first
        first = self._init_clients(client_ids)
        if not any(c in position_in_cache or c in pending or self.newest[c] for c in client_ids.tolist()):
            return first
        states = jax.tree.map(np.array, first)
        leaves = named_leaves(states)
        cached = {name: np.asarray(leaf) for name, leaf in named_leaves(cached_states).items()}
        for position, client in enumerate(client_ids.tolist()):
            if client in position_in_cache:
                state = {name: leaf[position_in_cache[client]] for name, leaf in cached.items()}
            elif client in pending:
                state = pending[client]
            elif self.newest[client]:
                state = self._read(client, leaves)
            else:
                continue
            for name, leaf in leaves.items():
                leaf[position] = state[name]
        return states

    def copy_to_host(self) -> dict[int, dict[str, np.ndarray]]:
        """Copies the cached states off the device and returns them by client. Until `commit`, `load` reads them."""
        client_ids, states = self._cached
        leaves = {name: np.array(leaf) for name, leaf in named_leaves(states).items()}
        by_client = {
            client: {name: leaf[position] for name, leaf in leaves.items()}
            for position, client in enumerate(client_ids.tolist())
        }
        self._pending = by_client if leaves else {}
        return self._pending

    def write(self, states: dict[int, dict[str, np.ndarray]], round: int) -> tuple[np.ndarray, list[Path]]:
        """Writes states after a round. Returns the new table `newest`, for `commit`, and the files to remove then."""
        newest = self.newest.copy()
        replaced = [self._file(client, newest[client]) for client in states if newest[client]]
        for client, leaves in states.items():
            save_file({name: np.asarray(leaf, order="C") for name, leaf in leaves.items()}, self._file(client, round))
            newest[client] = round
        return newest, replaced

    def commit(self, newest: np.ndarray) -> None:
        """Makes written files the newest. `newest` is set first, so a concurrent `load` always finds the state."""
        self.newest = newest
        self._pending = {}

    def _file(self, client: int, round: int) -> Path:
        return self._directory / f"client{client:06d}-round{round:06d}.safetensors"

    def _read(self, client: int, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        file = self._file(client, self.newest[client])
        try:
            stored = load_file(file)
            if wrong := [name for name, leaf in like.items() if stored[name].shape != leaf.shape[1:]]:
                raise ValueError(f"{wrong[0]} has another shape")
            return stored
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(
                f"{file}: lost or damaged ({error}); without {file.parents[1]} the same command starts this run again"
            ) from error
