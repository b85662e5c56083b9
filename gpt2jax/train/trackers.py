"""Trackers: copy the log of a run to TensorBoard or Weights & Biases."""

from __future__ import annotations

import dataclasses
import importlib
import os
import pathlib
from typing import Any, Protocol

import jax

from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.run_folder import RunFolder
from gpt2jax.utils.validation import must_be

# the package that a tracker needs
_NEEDS = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Tracker(Protocol):
    """Takes the entries of the log, one by one."""

    def write(self, entry: dict[str, float]) -> None:
        """Write one entry of the history."""

    def close(self) -> None:
        """Wait until everything is written."""


class TensorBoard:
    """Writes the event files that `tensorboard --logdir RUN` shows."""

    def __init__(self, folder: pathlib.Path, config: dict[str, Any]):
        self._writer = _import("tensorboard").SummaryWriter(str(folder / "tensorboard"))
        if config["first_step"] == 0:  # those of a resumed run are there
            plain = {
                name: value if isinstance(value, bool | int | float) else str(value)
                for name, value in config.items()
            }
            self._writer.add_hparams(plain, {}, name="settings", global_step=0)

    def write(self, entry: dict[str, float]) -> None:
        for name, value in _named(entry).items():
            self._writer.add_scalar(name, value, int(entry["step"]))

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Writes a run of Weights & Biases into the run folder; `wandb sync` sends it."""

    def __init__(self, folder: pathlib.Path, config: dict[str, Any]):
        self._run = _import("wandb").init(
            project="gpt2jax",
            name=folder.name,
            dir=str(folder),
            config=config,
            mode=os.environ.get("WANDB_MODE", "offline"),
        )

    def write(self, entry: dict[str, float]) -> None:
        self._run.log(_named(entry), step=int(entry["step"]))

    def close(self) -> None:
        self._run.finish()


def check_trackers(config: FinetuneConfig, output: Any) -> None:
    """Check that the trackers can write, before anything long begins.

    Raises:
        ValueError: the run has no folder to write into.
        ModuleNotFoundError: a tracker is not installed; says what to install.
    """
    if config.trackers and output is None:
        problem = must_be("trackers", "empty without output", config.trackers)
        raise ValueError(f"{problem}; they write into the run folder")
    for name in config.trackers:
        _import(name)


def open_trackers(config: FinetuneConfig, folder: RunFolder | None, start: int) -> list[Tracker]:
    """Open the trackers of a run that begins at step `start`; of several processes the first one writes."""
    if folder is None or jax.process_index() != 0:
        return []
    settings = {**dataclasses.asdict(config), "first_step": start}
    makers = {
        "tensorboard": lambda: TensorBoard(folder.path, settings),
        "wandb": lambda: WeightsAndBiases(folder.path, settings),
    }
    return [makers[name]() for name in config.trackers]


def _named(entry: dict[str, float]) -> dict[str, float]:
    """Return the figures by "group/name": those of validations have another group."""
    named = {}
    for name, value in entry.items():
        group = "validation" if name.startswith("validation_") else "train"
        named[f"{group}/{name.removeprefix('validation_')}"] = value
    del named["train/step"]
    return named


def _import(name: str) -> Any:
    """Import the module of a tracker."""
    package = _NEEDS[name]
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"trackers={name!r} needs a package ({error}): pip install {package}"
        ) from None
