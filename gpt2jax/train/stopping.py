"""When a run ends before its last step: no better validation, no more time, or somebody asks."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gpt2jax.train.config import FinetuneConfig


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop, and did so between two steps.

    Attributes:
        signal: the number of the signal.
    """

    def __init__(self, number: int, message: str = ""):
        super().__init__(message or f"stopped by {signal.Signals(number).name}")
        self.signal = number


class StopController:
    """Early stopping, the limit of time, and SIGINT and SIGTERM, which wait for the end of a step.

    As a context it takes the two signals; a second one of them acts at once, as without it. In a thread other than
    the main one signals stay as they are. Several processes have to end with the same step, since each step needs all
    of them: they agree at each entry of the log, where one that is to end ends all.

    Args:
        config: the settings.
        history: entries of the log, which grows as the run goes on; early stopping follows from it alone, so that a
            resumed run stops where the whole one does.
    """

    def __init__(self, config: FinetuneConfig, history: Sequence[dict[str, float]]):
        self._config, self._history = config, history
        self._start = time.monotonic()
        self._asked: int | None = None
        self._agreed: tuple[int, bool] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopController:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()

    def _give_back(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = number
        self._give_back()

    def agree(self, step: int) -> None:
        """Of several processes: what holds for one of them holds for all from here on. All must call it."""
        if jax.process_count() == 1:
            return
        self._agreed = self._agreed or (0, False)
        if step % self._config.log_every == 0:
            own = np.array([self._asked or 0, self._own_time_is_over()], np.int32)
            asked, over = multihost_utils.process_allgather(own).max(axis=0)
            self._agreed = int(asked), bool(over)

    def stop_if_asked(self) -> None:
        """Raises Interrupted where a signal came since the last step."""
        asked = self._asked if self._agreed is None else self._agreed[0]
        if asked:
            raise Interrupted(asked)

    def is_best(self, loss: float) -> bool:
        """Whether a validation loss that is not in the history yet is below all that are."""
        return loss < min(self._validations(), default=math.inf)

    def patience_is_over(self) -> bool:
        """Whether the last `patience` validations were all no better than the best before them."""
        losses, patience = self._validations(), self._config.patience
        if patience is None or len(losses) <= patience:
            return False
        return min(losses[-patience:]) >= min(losses[:-patience])

    def time_is_over(self) -> bool:
        """Whether the run has taken `max_minutes`."""
        return self._own_time_is_over() if self._agreed is None else self._agreed[1]

    def _own_time_is_over(self) -> bool:
        limit = self._config.max_minutes
        return limit is not None and time.monotonic() - self._start >= 60 * limit

    def _validations(self) -> list[float]:
        return [entry["validation_loss"] for entry in self._history if "validation_loss" in entry]


def stopped(interrupt: KeyboardInterrupt, checkpoints: Any, folder: Any) -> KeyboardInterrupt:
    """The same interrupt with what was saved and how to go on."""
    number = interrupt.signal if isinstance(interrupt, Interrupted) else signal.SIGINT
    if checkpoints is None:
        return Interrupted(number, "stopped; nothing was saved, since the run has no folder")
    step = checkpoints.latest_step()
    if step is None:
        return Interrupted(number, "stopped before the first checkpoint; nothing was saved")
    return Interrupted(number, f"stopped; step {step} is saved in {folder.path}, resume goes on from there")
