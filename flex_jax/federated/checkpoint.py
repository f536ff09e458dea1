"""A run on disk: the newest finished round, and the rows of clients, a file each, paged in as cohorts need them.

A client that never took part has no file: its row is the one it starts with. So memory, and the time of a round, do not
depend on the number of clients.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import load_file, save_file

from flex_jax.federated.state import ClientState, RoundState


class Checkpoints:
    """The rounds of one run in a directory of its own. Use as a context manager.

    fresh: numbers [C] -> the rows that these clients start with; clients: N.

    A round counts as saved when orbax has written its server's state and the table of which file is whose, as a whole
    or not at all. Files of clients are written before that, under new names, and old ones removed after it. Both happen
    in the background, while the next round runs. A round that was cut off writes the same files when it runs again.
    """

    def __init__(self, directory: Path, fresh: Callable[[np.ndarray], ClientState], clients: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(directory.absolute() / "server", options=options)
        self._rows = directory / "clients"
        self._rows.mkdir(exist_ok=True)
        self._fresh = fresh
        self._newest = np.zeros(clients, np.int32)  # the round after which a client's row was written; 0: never
        self._resident: tuple[bytes, ClientState] | None = None  # the last cohort and its rows, still on the device
        self._writer, self._saving = ThreadPoolExecutor(1), Future()
        self._saving.set_result(None)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._writer.shutdown()  # waits for the save under way
        self._manager.close()
        if error[0] is None:
            self._saving.result()

    def load(self, numbers: np.ndarray) -> ClientState:
        """The newest rows of the clients `numbers` [C], leading axis C."""
        numbers = np.asarray(numbers, np.int32)
        if self._resident and self._resident[0] == numbers.tobytes():
            return self._resident[1]
        self._saving.result()
        if not self._newest[numbers].any():
            return self._fresh(numbers)
        rows = jax.tree.map(np.array, self._fresh(numbers))
        leaves, structure = jax.tree.flatten(rows)
        for position in np.flatnonzero(self._newest[numbers]):
            held = load_file(self._file(numbers[position], self._newest[numbers[position]]))
            for i, leaf in enumerate(leaves):
                leaf[position] = held[str(i)]
        return jax.tree.unflatten(structure, leaves)

    def save(self, state: RoundState, numbers: np.ndarray) -> None:
        """Save after round `state.round`, in which the clients `numbers` [C] took part. The copy off the device is made
        before this returns, the rest in the background."""
        self._saving.result()  # one at a time; and an error of the last save is raised here
        self._resident = np.asarray(numbers, np.int32).tobytes(), state.clients
        held = jax.tree.map(np.array, state._replace(clients=jax.tree.leaves(state.clients)))
        self._saving = self._writer.submit(self._write, held, np.array(numbers))

    def restore(self, like: RoundState) -> RoundState | None:
        """The newest saved state, in the structure, shapes and dtypes of `like`, without clients: `load` gives their
        rows. None when there is none."""
        if self._manager.latest_step() is None:
            return None
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, self._saved(like, self._newest))
        saved = self._manager.restore(self._manager.latest_step(), args=ocp.args.StandardRestore(target))
        self._newest = np.array(saved["newest"])
        return like._replace(**{name: saved[name] for name in ("round", "server", "key")})

    def _write(self, held: RoundState, numbers: np.ndarray) -> None:
        round, newest = int(held.round), self._newest.copy()
        old = [self._file(number, newest[number]) for number in numbers if newest[number]]
        if held.clients:
            for position, number in enumerate(numbers):
                leaves = {str(i): np.ascontiguousarray(leaf[position]) for i, leaf in enumerate(held.clients)}
                save_file(leaves, self._file(number, round))
            newest[numbers] = round
        self._manager.save(round, args=ocp.args.StandardSave(self._saved(held, newest)))
        self._newest = newest
        for file in old:
            file.unlink(missing_ok=True)

    def _file(self, number: int, round: int) -> Path:
        return self._rows / f"client{number:06d}-round{round:06d}.safetensors"

    @staticmethod
    def _saved(state: RoundState, newest: np.ndarray) -> dict:
        return {"round": state.round, "server": state.server, "key": state.key, "newest": newest}
