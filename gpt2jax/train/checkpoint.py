"""Checkpoints of a training state: Orbax writes them in the background, whole or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gpt2jax.model.gpt2 import Params
from gpt2jax.train.step import TrainState
from gpt2jax.utils.atomic_io import make_folder, naming_file, sync_folder
from gpt2jax.weights.orbax import check_checkpoint, plain_path, readable_checkpoint, seal_checkpoint

_PENDING = "unlogged"  # the name of the pending metrics on disk


@functools.cache
def _sealed_path() -> Any:
    """Return the class of Orbax that gives a checkpoint its name, changed to seal the checkpoint before."""
    from orbax.checkpoint import path

    class SealedPath(path.atomicity.AtomicRenameTemporaryPath):
        async def finalize(self) -> None:
            is_checkpoint = self.get_final().name.isdecimal()  # else it is an item of one
            if is_checkpoint:
                await asyncio.to_thread(seal_checkpoint, pathlib.Path(self.get()))
            await super().finalize()
            if is_checkpoint:
                sync_folder(self.get_final().parent)

    return SealedPath


@functools.cache
def _silence_orbax() -> None:
    """Keep Orbax from printing the errors that it also raises: up to 600 lines of tracebacks for a full disk."""
    logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
    show = sys.unraisablehook

    def show_others(unraisable: sys.UnraisableHookArgs) -> None:
        # a write that goes on after another one of the same checkpoint has failed
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = show_others


class _Folder:
    """A folder of checkpoints, one folder for each step, and Orbax's manager of it.

    Args:
        folder: of the checkpoints, which is made if it does not exist.
        keep: number of checkpoints to keep.
    """

    def __init__(self, folder: pathlib.Path, keep: int):
        import orbax.checkpoint as ocp

        self.path = folder
        _silence_orbax()
        make_folder(folder)
        self._remove_leftovers()
        self._open = contextlib.ExitStack()
        self._plain = self._open.enter_context(plain_path(folder))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, temporary_path_class=_sealed_path()
        )
        self.manager = ocp.CheckpointManager(self._plain, options=options)

    def save(self, step: int, args: Any) -> None:
        """Copy what is to be saved and write it in the background."""
        with self._writing():
            self.manager.save(step, args=args)

    def restore(self, step: int | None, args: Any) -> Any:
        """Check and read a checkpoint."""
        advice = "; without it the run goes on from the one before"
        with readable_checkpoint(f"step {step} in {self.path}", advice):
            check_checkpoint(self.path / str(step))
            return self.manager.restore(step, args=args)

    def close(self) -> None:
        """Wait until everything is on disk."""
        with self._writing():
            self.manager.wait_until_finished()
            self.manager.close()
        # only now: a thread that still writes must not find another folder under this number
        self._open.close()

    def _remove_leftovers(self) -> None:
        """Delete checkpoints that were not finished; no other process writes here, since the run folder is locked."""
        if jax.process_index() == 0:
            for leftover in self.path.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(leftover, ignore_errors=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn any error of Orbax in the block into an OSError that names the folder and the last whole checkpoint."""
        try:
            with naming_file(self.path):
                yield
        except Exception as error:
            for _ in range(
                5
            ):  # writes of other arrays go on for a moment; what they leave then, the next run deletes
                self._remove_leftovers()
                time.sleep(0.1)
            whole = self.manager.latest_step()
            kept = "there is no earlier one" if whole is None else f"that of step {whole} is whole"
            reason = str(error).replace(str(self._plain), str(self.path))
            raise OSError(f"a checkpoint can't be written to {self.path} ({kept}): {reason:.300}") from error


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
        self._folder = _Folder(self.folder, keep)

    def latest_step(self) -> int | None:
        """Return the step of the newest whole checkpoint, or None."""
        return self._folder.manager.latest_step()

    def last_finite_step(self, failed: int) -> int | None:
        """Return the newest checkpoint that a finite step followed, if step `failed` was the first that was not."""
        steps = self._folder.manager.all_steps()
        return max((step for step in steps if step < failed - 1), default=None)

    def save(self, step: int, state: TrainState, pending_metrics: list[dict[str, float]]) -> None:
        """Copy the state and write it in the background; a step that has been saved is skipped.

        Args:
            step: steps done.
            state: the training state.
            pending_metrics: of the steps since the last entry of the log, which go into the next entry.

        Raises:
            OSError: this checkpoint or the one before can't be written.
        """
        if self.latest_step() != step:
            args = self._ocp.args
            # a copy: the list grows while it is written
            pending = args.JsonSave({"steps": list(pending_metrics)})
            items = {"state": args.StandardSave(state), _PENDING: pending, "run": args.JsonSave(self._run)}
            self._folder.save(step, args.Composite(**items))

    def restore(self, template: Any) -> tuple[TrainState, list[dict[str, float]]]:
        """Read state and pending metrics of the newest checkpoint; the state as `template` in structure and dtypes.

        Raises:
            ValueError: a file of the checkpoint is missing or damaged, or does not fit the template.
        """
        args = self._ocp.args
        abstract = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, template)
        items = {"state": args.StandardRestore(abstract), _PENDING: args.JsonRestore()}
        restored = self._folder.restore(self.latest_step(), args.Composite(**items))
        return restored["state"], restored[_PENDING]["steps"]

    def close(self) -> None:
        """Wait until everything is on disk.

        Raises:
            OSError: a checkpoint can't be written.
        """
        self._folder.close()


class BestCheckpoint:
    """The parameters of the best validation: in `folder`, or in memory if that is None."""

    def __init__(self, folder: pathlib.Path | None):
        import orbax.checkpoint as ocp

        self._ocp, self._held = ocp, None
        self._folder = None if folder is None else _Folder(folder.absolute(), 1)

    def save(self, step: int, params: Params) -> None:
        """Replace the parameters kept so far. A resumed run that meets the same best again leaves it."""
        if self._folder is None:
            self._held = jax.tree.map(jnp.copy, params)
        elif self._folder.manager.latest_step() != step:
            for later in [kept for kept in self._folder.manager.all_steps() if kept > step]:
                self._folder.manager.delete(later)  # of a run that went on from here before it was killed
            self._folder.save(step, self._ocp.args.StandardSave(params))

    def restore(self, template: Params) -> Params:
        """Return the best parameters, as `template` in structure and dtypes; `template` itself if none were kept."""
        if self._folder is None:
            return template if self._held is None else self._held
        folder = _Folder(self._folder.path, 1)  # the other one is closed
        with contextlib.closing(folder):
            step = folder.manager.latest_step()
            if step is None:
                return template
            abstract = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, template)
            return folder.restore(step, self._ocp.args.StandardRestore(abstract))

    def close(self) -> None:
        """Wait until everything is on disk."""
        if self._folder is not None:
            self._folder.close()
