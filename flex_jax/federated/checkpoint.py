"""A run on disk: the state of its server after the newest finished rounds, and the states of its clients."""

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from flex_jax.errors import InputError
from flex_jax.federated.client_store import ClientStore, Damaged
from flex_jax.federated.state import NO_CLIENTS, ClientState, RoundState
from flex_jax.files import read_text, sweep, write_json
from flex_jax.fingerprint import Fingerprint, differences, digest_json, of_files
from flex_jax.locks import reading, removing
from flex_jax.terminal import tell

Totals = Counter[str]  # what was counted over the rounds of a run, such as bytes


class Label(NamedTuple):
    """What is stored with a server state."""

    newest: np.ndarray  # the table of client files, see ClientStore
    totals: Totals
    files: dict[str, Fingerprint]  # of the server state


class Checkpoints:
    """The rounds of one run in a directory. Use as a context manager.

    A round is stored once its label is written: the identity of the run, the table of client files, the totals, and the
    sizes and digests of the files of the server state. Client files and the server state, by orbax, are written before
    that under new names. All of it happens in the background while the next round runs. A round that was interrupted
    writes the same files when it runs again. The round before stays stored, with its client files, and takes the place
    of the newest one if that is damaged.

    Args:
        directory: of the run.
        init_clients: client ids [C] -> their first states.
        num_clients: N, that of the federation.
        identity: everything that decides about a run's results, in JSON's types. A run of another one is refused.
        read_only: nothing is written or removed; another process may train at the same time.
    """

    def __init__(
        self,
        directory: Path,
        init_clients: Callable[[np.ndarray], ClientState],
        num_clients: int,
        identity: dict[str, Any],
        *,
        read_only: bool = False,
    ):
        self._directory, self._identity = directory, json.loads(json.dumps(identity))
        self.clients = ClientStore(directory / "clients", init_clients, num_clients, digest_json(self._identity))
        if not read_only:
            (directory / "clients").mkdir(parents=True, exist_ok=True)
            (directory / ".reading").touch()
            sweep(directory)
            sweep(directory / "clients")
        options = ocp.CheckpointManagerOptions(
            create=not read_only, cleanup_tmp_directories=not read_only, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(
            directory.absolute() / "server", options=options, item_handlers=ocp.StandardCheckpointHandler()
        )
        self._tables: dict[int, np.ndarray] = {}  # of the stored rounds, see ClientStore.newest
        self._writer, self._saving = ThreadPoolExecutor(1), Future()
        self._saving.set_result(None)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._writer.shutdown()  # waits for the save in progress
        self._manager.close()
        if error[0] is None:
            self._saving.result()

    def save(self, state: RoundState, totals: Totals) -> None:
        """Saves the server state after round `state.round`, the totals, and the clients in the store's cache.

        The copy off the device is made before this returns, the rest in the background.
        """
        self._saving.result()  # one save at a time; an error of the last one is raised here
        client_states = self.clients.copy_to_host()
        without_clients = jax.tree.map(np.array, state._replace(clients=NO_CLIENTS))
        self._saving = self._writer.submit(self._write, without_clients, Totals(totals), client_states)

    def restore(self, like: RoundState) -> tuple[RoundState, Totals] | None:
        """Returns the newest sound round, without clients, and the totals up to it; None if no round is stored.

        `like` has the structure of the state. Files that no sound round needs are removed. Raises InputError if the
        rounds are of another run, or none of them is sound.
        """
        restored = self._newest_sound(like, self.clients.check)
        last = int(restored[0].round) if restored else 0
        with removing(self._directory, wait=True):
            for round in self._rounds():
                try:
                    if round <= last and len(self._tables) < 2:
                        self._tables[round] = self._label(round).newest
                except Damaged:  # an older round, which nobody needs
                    continue
            for round in {*self._rounds(), *self._manager.all_steps()} - self._tables.keys():
                self._remove(round)
            self.clients.remove_except(list(self._tables.values()))
        return restored

    def read(self, like: RoundState, client_ids: list[int]) -> RoundState | None:
        """Returns the newest sound round with the states of some clients, while another process may train on.

        Raises InputError as `restore`.
        """
        loaded = [NO_CLIENTS]
        with reading(self._directory):
            self._manager.reload()
            restored = self._newest_sound(like, lambda _: loaded.append(self.clients.load(np.array(client_ids, int))))
        return restored and restored[0]._replace(clients=loaded[-1] if client_ids else NO_CLIENTS)

    def _newest_sound(self, like: RoundState, check_clients: Callable[[int], None]) -> tuple[RoundState, Totals] | None:
        """Reads rounds, the newest first, until one is sound. `check_clients` raises Damaged if its clients are not."""
        first: Damaged | None = None
        for round in self._rounds():
            try:
                label = self._label(round)
                state = self._state(round, label, like)
                self.clients.newest = label.newest
                check_clients(round)
            except Damaged as error:
                first = first or error
                continue
            if first:
                tell(f"{first.problem}: round {round} takes the place of a later one")
            return state, label.totals
        if first:
            raise first
        return None

    def _label(self, round: int) -> Label:
        """Reads the label of a stored round. Raises Damaged, or InputError if it is of another run."""
        content = _read_label(self._label_file(round))
        if content is None or content["round"] != round:
            raise Damaged(self._label_file(round), self._directory, "it is not what was written")
        _check_identity(self._directory, content["identity"], self._identity)
        newest = np.zeros_like(self.clients.newest)
        newest[[int(client) for client in content["newest"]]] = list(content["newest"].values())
        return Label(newest, Totals(content["totals"]), content["files"])

    def _state(self, round: int, label: Label, like: RoundState) -> RoundState:
        """Reads the server's state. Raises Damaged before orbax reads anything that was not written so."""
        step = self._directory / "server" / str(round)
        if changed := list(differences(label.files, _files(step))):
            raise Damaged(step, self._directory, changed[0])
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _arrays(like))
        return like._replace(**self._manager.restore(round, args=ocp.args.StandardRestore(target)))

    def _write(self, state: RoundState, totals: Totals, client_states: dict[int, dict[str, np.ndarray]]) -> None:
        round = int(state.round)
        newest = self.clients.write(client_states, round)
        self._manager.save(round, args=ocp.args.StandardSave(_arrays(state)))
        label: dict[str, Any] = {
            "identity": self._identity,
            "round": round,
            "newest": {str(client): int(newest[client]) for client in np.flatnonzero(newest)},
            "totals": dict(totals),
            "files": _files(self._directory / "server" / str(round)),
        }
        write_json(self._label_file(round), label | {"sha256": digest_json(label)})
        self.clients.commit(newest)
        self._tables[round] = newest
        with removing(self._directory) as nobody_reads:
            for old in sorted(self._tables)[:-2] if nobody_reads else []:
                self._remove(old)
                self.clients.remove_replaced(self._tables.pop(old), list(self._tables.values()))

    def _remove(self, round: int) -> None:
        self._label_file(round).unlink(missing_ok=True)  # first: a label without its round would be damage
        if round in self._manager.all_steps():
            self._manager.delete(round)

    def _label_file(self, round: int) -> Path:
        return self._directory / f"round{round:06d}.json"

    def _rounds(self) -> list[int]:
        """Returns the rounds that have a label, the newest first."""
        names = (file.stem.removeprefix("round") for file in self._directory.glob("round*.json"))
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def check_stored(directory: Path, identity: dict[str, Any]) -> None:
    """Raises InputError if the newest sound label in a run's directory is of another identity."""
    labels = map(_read_label, sorted(directory.glob("round*.json"), reverse=True))
    if newest := next(filter(None, labels), None):
        _check_identity(directory, newest["identity"], json.loads(json.dumps(identity)))


def _check_identity(directory: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    if different := sorted(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key)):
        raise InputError(
            f"{directory}: of another run (different: {', '.join(different)}); without it the same command starts this "
            "run again"
        )


def _read_label(file: Path) -> dict[str, Any] | None:
    """Returns what was written into a label, without its checksum; None if that is not what the file has."""
    try:
        content = json.loads(read_text(file))
        return content if content.pop("sha256") == digest_json(content) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _files(step: Path) -> dict[str, Fingerprint]:
    return of_files({str(file.relative_to(step)): file for file in sorted(step.rglob("*")) if file.is_file()})


def _arrays(state: RoundState) -> dict[str, Any]:
    return {"round": state.round, "server": state.server, "key": state.key}
