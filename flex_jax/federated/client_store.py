"""The states of all clients of a run: one file for each client, read when its cohort needs it.

A client that never took part has no file: its state is its first one. So neither memory nor the time of a round depends
on the number of clients.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flex_jax.errors import InputError
from flex_jax.federated.state import NO_CLIENTS, ClientState
from flex_jax.files import replacing
from flex_jax.fingerprint import digest_arrays


class Damaged(InputError):
    """A file of a run is lost or is not what was written."""

    def __init__(self, file: Path, run: Path, reason: str):
        self.problem = f"{file}: lost or damaged ({reason})"
        super().__init__(f"{self.problem}; without {run} the same command starts this run again")


def named_leaves(state: Any) -> dict[str, np.ndarray]:
    """Returns the arrays of a tree by their paths, such as "personal/layers/moe/slot/gate"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


class ClientStore:
    """The newest state of every client: on the device, on its way to the disk, or on the disk.

    Args:
        directory: of the files.
        init_clients: client ids [C] -> their first states.
        num_clients: N, that of the federation.
        run: what identifies the run. It is written into every file, and a file of another run is refused.
    """

    def __init__(
        self, directory: Path, init_clients: Callable[[np.ndarray], ClientState], num_clients: int, run: str = ""
    ):
        self.newest = np.zeros(num_clients, np.int32)  # the finished rounds when a client was written; 0: no file
        self._directory = directory
        self._init_clients = init_clients
        self._run = run
        self._cached: tuple[np.ndarray, ClientState] = np.zeros(0, np.int32), NO_CLIENTS  # the last cohort
        self._pending: dict[int, dict[str, np.ndarray]] = {}  # client -> state that another thread is writing

    def cache(self, client_ids: np.ndarray, states: ClientState) -> None:
        """Makes `states` the newest of the clients `client_ids` [C]. They stay on the device."""
        self._cached = np.asarray(client_ids, np.int32), states

    def load(self, client_ids: np.ndarray) -> ClientState:
        """Returns the newest states of clients [C], leading axis C. Raises Damaged for a lost or damaged file."""
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

    def load_former(self, client_ids: np.ndarray) -> ClientState:
        """Returns the states that clients [C] had before the last round, which has consumed the cached ones."""
        self._cached = np.zeros(0, np.int32), NO_CLIENTS
        return self.load(client_ids)

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

    def write(self, states: dict[int, dict[str, np.ndarray]], round: int) -> np.ndarray:
        """Writes states after a round. Returns the new table `newest`, for `commit`. No file is replaced."""
        newest = self.newest.copy()
        for client, leaves in states.items():
            arrays = {name: np.asarray(leaf, order="C") for name, leaf in leaves.items()}
            with replacing(self._file(client, round)) as temporary:
                save_file(arrays, temporary, self._label(client, round) | {"sha256": digest_arrays(arrays)})
            newest[client] = round
        return newest

    def commit(self, newest: np.ndarray) -> None:
        """Makes written files the newest. `newest` is set first, so a concurrent `load` always finds the state."""
        self.newest = newest
        self._pending = {}

    def check(self, round: int) -> None:
        """Raises Damaged for a lost file, or a damaged one that was written after `round`."""
        like = named_leaves(jax.eval_shape(lambda: self._init_clients(np.arange(1))))
        for client in np.flatnonzero(self.newest).tolist():
            if self.newest[client] == round:
                self._read(client, like)
            elif not self._file(client, self.newest[client]).is_file():
                raise self._damaged(client, "no such file")

    def remove_except(self, tables: list[np.ndarray]) -> None:
        """Removes the files that none of these tables names."""
        named = {self._file(client, table[client]) for table in tables for client in np.flatnonzero(table).tolist()}
        for file in self._directory.glob("client*.safetensors"):
            if file not in named:
                file.unlink()

    def remove_replaced(self, old: np.ndarray, tables: list[np.ndarray]) -> None:
        """Removes the files of the table `old` that none of the other tables names."""
        for client in np.flatnonzero((old > 0) & np.all([table != old for table in tables], axis=0)).tolist():
            self._file(client, old[client]).unlink(missing_ok=True)

    def _file(self, client: int, round: int) -> Path:
        return self._directory / f"client{client:06d}-round{round:06d}.safetensors"

    def _label(self, client: int, round: int) -> dict[str, str]:
        return {"client": str(client), "round": str(round), "run": self._run}

    def _read(self, client: int, like: dict[str, Any]) -> dict[str, np.ndarray]:
        """Reads a client's file. `like`: arrays or shapes with a leading axis. Raises Damaged."""
        round = int(self.newest[client])
        if not self._file(client, round).is_file():
            raise self._damaged(client, "no such file")
        try:
            with safe_open(self._file(client, round), "np") as file:
                stored = {name: file.get_tensor(name) for name in file.keys()}
                label = dict(file.metadata() or {})
        except (OSError, SafetensorError) as error:
            raise self._damaged(client, str(error).split(": ")[0]) from error
        wanted = {name: (leaf.shape[1:], leaf.dtype) for name, leaf in like.items()}
        if label != self._label(client, round) | {"sha256": label.get("sha256")}:
            raise self._damaged(client, "it is the file of another client, round or run")
        if label["sha256"] != digest_arrays(stored):
            raise self._damaged(client, "its content does not have its checksum")
        if {name: (leaf.shape, leaf.dtype) for name, leaf in stored.items()} != wanted:
            raise self._damaged(client, "its arrays are not those of the method")
        return stored

    def _damaged(self, client: int, reason: str) -> Damaged:
        return Damaged(self._file(client, self.newest[client]), self._directory.parent, reason)
