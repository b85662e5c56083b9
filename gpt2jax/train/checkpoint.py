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

    def save(self, step: int, state: TrainState, unlogged: list[dict[str, float]]) -> None:
        """Copies the state and writes it in the background; does nothing for a step that is there already.

        Args:
            step: steps done.
            state: the training state.
            unlogged: metrics of the steps since the last entry of the log, which the next entry sums up.
        """
        if self.latest_step() != step:
            args = self._ocp.args
            items = {"state": args.StandardSave(state), "unlogged": args.JsonSave({"steps": unlogged})}
            self._manager.save(step, args=args.Composite(**items))

    def restore(self, template: Any) -> tuple[TrainState, list[dict[str, float]]]:
        """State and unlogged metrics of the newest checkpoint; the state in structure and dtypes of `template`."""
        args = self._ocp.args
        abstract = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, template)
        items = {"state": args.StandardRestore(abstract), "unlogged": args.JsonRestore()}
        restored = self._manager.restore(self.latest_step(), args=args.Composite(**items))
        return restored["state"], restored["unlogged"]["steps"]

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
