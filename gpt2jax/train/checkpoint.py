"""Checkpoints of a training state: Orbax writes them in the background, whole or not at all."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gpt2jax.model.gpt2 import Params
from gpt2jax.train.step import TrainState
from gpt2jax.weights.orbax import readable_checkpoint

_PENDING = "unlogged"  # the name of the pending metrics on disk


class Checkpoints:
    """The checkpoints of one run, a folder for each step; only the newest `keep` of them stay.

    Orbax writes into a temporary folder and renames it when everything is on disk, so a run that is killed in the
    middle of a save still has its previous checkpoint.

    Args:
        folder: of the checkpoints.
        keep: number of checkpoints to keep.
        run: description of the run, which each checkpoint holds too.
    """

    def __init__(self, folder: str | pathlib.Path, *, keep: int = 2, run: Mapping[str, Any] | None = None):
        import orbax.checkpoint as ocp

        self._ocp, self._run = ocp, dict(run or {})
        self.folder = pathlib.Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest_step(self) -> int | None:
        """Return the step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def last_finite_step(self, failed: int) -> int | None:
        """Return the newest checkpoint that a finite step followed, if step `failed` was the first that was not."""
        return max((step for step in self._manager.all_steps() if step < failed - 1), default=None)

    def save(self, step: int, state: TrainState, pending_metrics: list[dict[str, float]]) -> None:
        """Copy the state and write it in the background; a step that has been saved is skipped.

        Args:
            step: steps done.
            state: the training state.
            pending_metrics: of the steps since the last entry of the log, which go into the next entry.
        """
        if self.latest_step() != step:
            args = self._ocp.args
            # a copy: the list grows while it is written
            pending = args.JsonSave({"steps": list(pending_metrics)})
            items = {"state": args.StandardSave(state), _PENDING: pending, "run": args.JsonSave(self._run)}
            self._manager.save(step, args=args.Composite(**items))

    def restore(self, template: Any) -> tuple[TrainState, list[dict[str, float]]]:
        """Read state and pending metrics of the newest checkpoint; the state as `template` in structure and dtypes."""
        args = self._ocp.args
        abstract = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, template)
        items = {"state": args.StandardRestore(abstract), _PENDING: args.JsonRestore()}
        step = self.latest_step()
        with readable_checkpoint(
            f"step {step} in {self._manager.directory}", "; without it the run goes on from the one before"
        ):
            restored = self._manager.restore(step, args=args.Composite(**items))
            return restored["state"], restored[_PENDING]["steps"]

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


class BestCheckpoint:
    """The parameters of the best validation: in `folder`, or in memory if that is None."""

    def __init__(self, folder: pathlib.Path | None):
        import orbax.checkpoint as ocp

        self._ocp, self._manager, self._held = ocp, None, None
        if folder is not None:
            options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, params: Params) -> None:
        """Replace the parameters kept so far. A resumed run that meets the same best again leaves it."""
        if self._manager is None:
            self._held = jax.tree.map(jnp.copy, params)
        elif self._manager.latest_step() != step:
            for later in [kept for kept in self._manager.all_steps() if kept > step]:
                self._manager.delete(later)  # of a run that went on from here before it was killed
            self._manager.save(step, args=self._ocp.args.StandardSave(params))

    def restore(self, template: Params) -> Params:
        """Return the best parameters, as `template` in structure and dtypes; `template` itself if none were kept."""
        if self._manager is None:
            return template if self._held is None else self._held
        manager = self._ocp.CheckpointManager(self._manager.directory)
        if manager.latest_step() is None:
            return template
        abstract = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, template)
        best = manager.restore(manager.latest_step(), args=self._ocp.args.StandardRestore(abstract))
        manager.close()
        return best

    def close(self) -> None:
        """Wait until everything is on disk."""
        if self._manager is not None:
            self._manager.wait_until_finished()
            self._manager.close()
