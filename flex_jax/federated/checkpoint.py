"""Checkpoints of the round state: one a round, written as a whole or not at all."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from flex_jax.federated.state import RoundState


class Checkpoints:
    """The newest finished round of one run, kept by orbax in a directory of its own. Use as a context manager."""

    def __init__(self, directory: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._manager.close()  # waits for the save under way

    def save(self, state: RoundState) -> None:
        """Save after round `state.round`; the copy off the device is made before this returns, the rest in the
        background."""
        self._manager.save(int(state.round), args=ocp.args.StandardSave(state))

    def restore(self, like: RoundState) -> RoundState | None:
        """The newest saved state, in the structure, shapes and dtypes of `like`; None when there is none."""
        if self._manager.latest_step() is None:
            return None
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._manager.restore(self._manager.latest_step(), args=ocp.args.StandardRestore(shapes))
