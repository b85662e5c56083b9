"""The reasons for a run to end before its last step: patience, a time limit, or a signal."""

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
    """A signal stopped a run between two steps.

    Attributes:
        signal: the number of the signal.
        run: the `Run` so far, of a run without a folder.
    """

    run: Any = None

    def __init__(self, number: int, message: str = ""):
        super().__init__(message or f"stopped by {signal.Signals(number).name}")
        self.signal = number


class StopController:
    """Early stopping, the time limit, and SIGINT and SIGTERM, which wait for the end of a step.

    As a context it handles the two signals; the second signal acts at once, as it would without the controller. In
    threads other than the main one signals are left alone. Several processes must end with the same step, since each
    step needs all of them: they synchronise at each entry of the log, and one that is to end ends all.

    Args:
        config: the settings.
        history: entries of the log, which grows as the run goes on. Early stopping follows from it alone, so that a
            resumed run stops at the same step as an uninterrupted one.
    """

    def __init__(self, config: FinetuneConfig, history: Sequence[dict[str, float]]):
        self._config, self._history = config, history
        self._start = time.monotonic()
        self._signal: int | None = None
        self._synced: tuple[int, bool] | None = None  # (signal or 0, time is over) of all processes
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopController:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self._restore_handlers()

    def sync(self, step: int) -> None:
        """Let signals and the time limit of one process count for all from here on. All processes must call it."""
        if jax.process_count() == 1:
            return
        self._synced = self._synced or (0, False)
        if step % self._config.log_every == 0:
            own = np.array([self._signal or 0, self._own_time_limit_reached()], np.int32)
            number, over = multihost_utils.process_allgather(own).max(axis=0)
            self._synced = int(number), bool(over)

    def raise_if_signalled(self) -> None:
        """Raise Interrupted if a signal came since the last step."""
        number = self._signal if self._synced is None else self._synced[0]
        if number:
            raise Interrupted(number)

    def is_best(self, loss: float) -> bool:
        """Return True if a validation loss that is not in the history yet is below all that are."""
        return loss < min(self._validation_losses(), default=math.inf)

    def patience_exhausted(self) -> bool:
        """Return True if none of the last `patience` validations was better than the best before them."""
        losses, patience = self._validation_losses(), self._config.patience
        if patience is None or len(losses) <= patience:
            return False
        return min(losses[-patience:]) >= min(losses[:-patience])

    def time_limit_reached(self) -> bool:
        """Return True if the run has taken `max_minutes`."""
        return self._own_time_limit_reached() if self._synced is None else self._synced[1]

    def _own_time_limit_reached(self) -> bool:
        limit = self._config.max_minutes
        return limit is not None and time.monotonic() - self._start >= 60 * limit

    def _validation_losses(self) -> list[float]:
        return [entry["validation_loss"] for entry in self._history if "validation_loss" in entry]


def explain_interrupt(interrupt: KeyboardInterrupt, checkpoints: Any, folder: Any) -> KeyboardInterrupt:
    """Return the interrupt with what was saved and how to go on."""
    number = interrupt.signal if isinstance(interrupt, Interrupted) else signal.SIGINT
    if checkpoints is None:
        return Interrupted(
            number, "stopped; the run has no folder, and its model is in this exception's `run`"
        )
    step = checkpoints.latest_step()
    if step is None:
        return Interrupted(number, "stopped before the first checkpoint; nothing was saved")
    return Interrupted(
        number, f"stopped; step {step} is saved in {folder.path}; resume=True (--resume) goes on from there"
    )
