"""Checkpoints of a training state: written by Orbax in the background, whole or not at all."""

from __future__ import annotations

import pathlib
from typing import Any

import jax

from gpt2jax.train.step import TrainState


class Checkpoints:
    """The checkpoints of one run, a folder per step; the oldest beyond `keep` are removed.

    Orbax writes into a temporary folder and renames it when everything is on disk, so a run that is killed in the
    middle of a save still has its previous checkpoint.
    """

    def __init__(self, folder: str | pathlib.Path, *, keep: int = 2):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.folder = pathlib.Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state and writes it in the background; does nothing for a step that is there already."""
        if self.latest_step() != step:
            self._manager.save(step, args=self._ocp.args.StandardSave(state))

    def restore(self, template: Any) -> TrainState:
        """The newest checkpoint, in the structure, dtypes and shardings of `template`."""
        abstract = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, template)
        return self._manager.restore(self.latest_step(), args=self._ocp.args.StandardRestore(abstract))

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
