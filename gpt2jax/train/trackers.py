"""The log for others to show: TensorBoard and Weights & Biases, where a run asks for them."""

from __future__ import annotations

import dataclasses
import importlib
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any, Protocol

import jax

from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.run_folder import RunFolder


class Tracker(Protocol):
    """Takes the entries of the log."""

    def write(self, entry: dict[str, float]) -> None:
        """One entry of the history."""

    def close(self) -> None:
        """Waits until everything is written."""


class TensorBoard:
    """Writes the event files that `tensorboard --logdir RUN` shows."""

    def __init__(self, folder: pathlib.Path):
        self._event, self._summary, writer = _import_tensorboard()
        self._writer = writer(str(folder / "tensorboard"))

    def write(self, entry: dict[str, float]) -> None:
        values = [
            self._summary.Value(tag=f"train/{name}", simple_value=value)
            for name, value in entry.items()
            if name != "step"
        ]
        summary = self._summary(value=values)
        self._writer.add_event(self._event(step=int(entry["step"]), wall_time=time.time(), summary=summary))

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Writes a run of Weights & Biases: into the run folder, to be sent by `wandb sync` when somebody wants it."""

    def __init__(self, folder: pathlib.Path, config: dict[str, Any]):
        wandb = _import("wandb", "wandb")
        self._run = wandb.init(
            project="gpt2jax",
            name=folder.name,
            dir=str(folder),
            config=config,
            mode=os.environ.get("WANDB_MODE", "offline"),
        )

    def write(self, entry: dict[str, float]) -> None:
        values = {f"train/{name}": value for name, value in entry.items() if name != "step"}
        self._run.log(values, step=int(entry["step"]))

    def close(self) -> None:
        self._run.finish()


def check_trackers(config: FinetuneConfig, output: Any) -> None:
    """Refuses what cannot be written, before anything long begins.

    Raises:
        ValueError: there is no run folder to write into.
        ModuleNotFoundError: a tracker is not installed; says what to install.
    """
    if config.track and output is None:
        raise ValueError(f"track={config.track!r} writes into the run folder; give output")
    if "tensorboard" in config.track:
        _import_tensorboard()
    if "wandb" in config.track:
        _import("wandb", "wandb")


def open_trackers(config: FinetuneConfig, folder: RunFolder | None, start: int) -> list[Tracker]:
    """The trackers that the settings ask for; of several processes the first one writes."""
    if folder is None or jax.process_index() != 0:
        return []
    makers = {
        "tensorboard": lambda: TensorBoard(folder.path),
        "wandb": lambda: WeightsAndBiases(folder.path, {**dataclasses.asdict(config), "first_step": start}),
    }
    return [makers[name]() for name in config.track]


def close_trackers(trackers: Sequence[Tracker]) -> None:
    """Closes all of them."""
    for tracker in trackers:
        tracker.close()


def _import_tensorboard() -> tuple[Any, Any, Any]:
    """(Event, Summary, EventFileWriter)."""
    parts = (
        ("tensorboard.compat.proto.event_pb2", "Event"),
        ("tensorboard.compat.proto.summary_pb2", "Summary"),
        ("tensorboard.summary.writer.event_file_writer", "EventFileWriter"),
    )
    event, summary, writer = (getattr(_import("tensorboard", module), name) for module, name in parts)
    return event, summary, writer


def _import(name: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"track={name!r} needs what is not installed ({error}): pip install {name}"
        ) from None
