"""A run on disk: the state of its server after the newest finished round, and the states of its clients."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from flex_jax.federated.client_store import ClientStore
from flex_jax.federated.state import NO_CLIENTS, ClientState, RoundState


class Checkpoints:
    """The rounds of one run in a directory. Use as a context manager.

    A round is saved once orbax has committed its server state and the table of client files; it commits both together.
    Client files are written before that under new names, and old ones are removed after it. All of it happens in the
    background while the next round runs. A round that was interrupted writes the same files when it runs again.
    """

    def __init__(self, directory: Path, init_clients: Callable[[np.ndarray], ClientState], num_clients: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(directory.absolute() / "server", options=options)
        self.clients = ClientStore(directory / "clients", init_clients, num_clients)
        self._writer, self._saving = ThreadPoolExecutor(1), Future()
        self._saving.set_result(None)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._writer.shutdown()  # waits for the save in progress
        self._manager.close()
        if error[0] is None:
            self._saving.result()

    def save(self, state: RoundState) -> None:
        """Saves the server state after round `state.round` and the clients in the store's cache.

        The copy off the device is made before this returns, the rest in the background.
        """
        self._saving.result()  # one save at a time; an error of the last one is raised here
        client_states = self.clients.copy_to_host()
        without_clients = jax.tree.map(np.array, state._replace(clients=NO_CLIENTS))
        self._saving = self._writer.submit(self._write, without_clients, client_states)

    def restore(self, like: RoundState) -> RoundState | None:
        """Returns the newest saved state, without clients, in the structure of `like`; None if there is none.

        Raises ValueError if it has another number of clients.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, self._saved(like, self.clients.newest))
        saved = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        if int(saved["clients"]) != len(self.clients.newest):  # orbax would truncate or pad the table
            raise ValueError(f"it has {int(saved['clients'])} clients, not {len(self.clients.newest)}")
        self.clients.newest = np.array(saved["newest"])
        return like._replace(**{name: saved[name] for name in ("round", "server", "key")})

    def _write(self, state: RoundState, client_states: dict[int, dict[str, np.ndarray]]) -> None:
        round = int(state.round)
        newest, replaced = self.clients.write(client_states, round)
        self._manager.save(round, args=ocp.args.StandardSave(self._saved(state, newest)))
        self.clients.commit(newest)
        for file in replaced:
            file.unlink(missing_ok=True)

    @staticmethod
    def _saved(state: RoundState, newest: np.ndarray) -> dict[str, Any]:
        clients = np.array(len(newest), np.int32)
        return {"round": state.round, "server": state.server, "key": state.key, "newest": newest, "clients": clients}
