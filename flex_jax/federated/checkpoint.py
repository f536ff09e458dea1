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
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from flex_jax.errors import InputError
from flex_jax.federated.state import NO_CLIENTS, ClientState, RoundState


def load_row(file: Path) -> list[np.ndarray]:
    """The leaves of one client, in order. Raises InputError for a file that is lost or damaged."""
    try:
        row = load_file(file)
        return [row[str(i)] for i in range(len(row))]
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(
            f"{file}: lost or damaged ({error}); without {file.parents[1]} the same command starts this run anew"
        ) from error


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
        self._held = np.zeros(0, np.int32), NO_CLIENTS  # the last cohort and its rows, still on the device
        self._writer, self._saving = ThreadPoolExecutor(1), Future()
        self._saving.set_result(None)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._writer.shutdown()  # waits for the save under way
        self._manager.close()
        if error[0] is None:
            self._saving.result()

    def hold(self, numbers: np.ndarray, rows: ClientState) -> None:
        """Take `rows` as the newest of the clients `numbers` [C], before they are saved."""
        self._held = np.asarray(numbers, np.int32), rows

    def load(self, numbers: np.ndarray) -> ClientState:
        """The newest rows of the clients `numbers` [C], leading axis C; those held as they are, on the device."""
        numbers, (held_numbers, held_rows) = np.asarray(numbers, np.int32), self._held
        if np.array_equal(numbers, held_numbers):
            return held_rows
        held = {number: position for position, number in enumerate(held_numbers.tolist())}
        on_disk = [number for number in numbers.tolist() if self._newest[number] and number not in held]
        if not on_disk and not held.keys() & set(numbers.tolist()):
            return self._fresh(numbers)
        leaves, structure = jax.tree.flatten(jax.tree.map(np.array, self._fresh(numbers)))
        held_leaves = jax.tree.map(np.asarray, jax.tree.leaves(held_rows))
        for position, number in enumerate(numbers.tolist()):
            if number in held:
                row = [leaf[held[number]] for leaf in held_leaves]
            elif number in on_disk:
                row = load_row(self._file(number, self._newest[number]))
            else:
                continue
            for leaf, new in zip(leaves, row, strict=True):
                leaf[position] = new
        return jax.tree.unflatten(structure, leaves)

    def save(self, state: RoundState) -> None:
        """Save after round `state.round` what it left at the server and the rows that are held. The copy off the device
        is made before this returns, the rest in the background."""
        self._saving.result()  # one at a time; and an error of the last save is raised here
        numbers, rows = self._held
        held = jax.tree.map(np.array, state._replace(clients=jax.tree.leaves(rows)))
        self._saving = self._writer.submit(self._write, held, numbers)

    def restore(self, like: RoundState) -> RoundState | None:
        """The newest saved state, in the structure, shapes and dtypes of `like`, without clients: `load` gives their
        rows. None when there is none. Raises ValueError when it is of another number of clients."""
        if self._manager.latest_step() is None:
            return None
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, self._saved(like, self._newest))
        saved = self._manager.restore(self._manager.latest_step(), args=ocp.args.StandardRestore(target))
        if int(saved["clients"]) != len(self._newest):  # orbax cuts or fills an array of another length
            raise ValueError(f"it is of {int(saved['clients'])} clients, not {len(self._newest)}")
        self._newest = np.array(saved["newest"])
        return like._replace(**{name: saved[name] for name in ("round", "server", "key")})

    def _write(self, held: RoundState, numbers: np.ndarray) -> None:
        round, newest = int(held.round), self._newest.copy()
        old = [self._file(number, newest[number]) for number in numbers if newest[number]]
        if held.clients:
            for position, number in enumerate(numbers):
                row = {str(i): np.array(leaf[position]) for i, leaf in enumerate(held.clients)}
                save_file(row, self._file(number, round))
            newest[numbers] = round
        self._manager.save(round, args=ocp.args.StandardSave(self._saved(held, newest)))
        self._newest = newest
        for file in old:
            file.unlink(missing_ok=True)

    def _file(self, number: int, round: int) -> Path:
        return self._rows / f"client{number:06d}-round{round:06d}.safetensors"

    @staticmethod
    def _saved(state: RoundState, newest: np.ndarray) -> dict:
        clients = np.array(len(newest), np.int32)
        return {"round": state.round, "server": state.server, "key": state.key, "newest": newest, "clients": clients}
