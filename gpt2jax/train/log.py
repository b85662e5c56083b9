"""The history of a run: the metrics of every step, averaged into entries of a log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.optimizer import make_schedule
from gpt2jax.train.run_folder import RunFolder
from gpt2jax.train.step import MIN_SCALE

Write = Callable[[dict[str, float]], None]


class NonFiniteError(FloatingPointError):
    """The loss or gradient of a step is not finite.

    Attributes:
        step: the number of the step, from 1.
        first: the first of the steps in a row that were not finite; with float16 those before `step` were skipped.
    """

    def __init__(self, step: int, message: str, *, first: int | None = None):
        super().__init__(f"step {step}: {message}")
        self.step, self.first = step, step if first is None else first


class TrainLog:
    """Collect the metrics of every step, one step behind the device, into entries of the history.

    Args:
        config: settings of the run.
        steps: of the run.
        folder: where the log is written, and read by a resumed run; None: nowhere.
        start: steps done.
        pending_metrics: of steps whose entry was not written when the run was stopped.
        writers: functions that take each entry too.

    Attributes:
        step: the last step that was added.
        history: the entries.
        pending_metrics: of the steps since the last entry.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        steps: int,
        folder: RunFolder | None,
        start: int,
        pending_metrics: list[dict[str, float]],
        writers: Sequence[Write] = (),
    ):
        self._config, self._folder, self._writers = config, folder, writers
        self._schedule = make_schedule(config, steps)
        self.step = start
        self.history = [] if folder is None else folder.read_metrics(up_to=start)
        logged = self.history[-1]["step"] if self.history else 0
        self.pending_metrics = [entry for entry in pending_metrics if entry["step"] > logged]
        self._tokens = self.history[-1]["tokens"] if self.history else 0
        self._seconds = self.history[-1]["seconds"] if self.history else 0.0
        self._unfetched: tuple[int, Any] | None = None
        self._clock = time.perf_counter()
        self._timed_tokens, self._timed_seconds = 0.0, 0.0
        self._first = True
        self._last_finite = start  # the last finite step, or the one that the run began after

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take the metrics of a step, and fetch those of the step before: the device stays busy with this one."""
        self.fetch()
        self._unfetched = (step, metrics)
        self.step = step
        if self._first:  # compiling is not part of the speed
            self.fetch()
            self.pause()
            self._timed_tokens = 0.0
            self._first = False

    def fetch(self) -> None:
        """Wait for the metrics of the last step; raises NonFiniteError if they are not finite."""
        if self._unfetched is None:
            return
        step, metrics = self._unfetched
        self._unfetched = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._check(step, values)
        self.pending_metrics.append({"step": step, **values})
        self._timed_tokens += values["tokens"]

    def pause(self) -> None:
        """Stop the clock of the speed: what comes before the next entry is not training."""
        self.fetch()
        now = time.perf_counter()
        if not self._first:
            self._timed_seconds += now - self._clock
        self._seconds += now - self._clock
        self._clock = now

    def flush(self, extra: dict[str, float]) -> dict[str, float]:
        """Write one entry over all steps since the last one, with the figures of a validation in `extra`."""
        self.fetch()
        now = time.perf_counter()
        if not extra:  # a validation took the time since the pause
            self._timed_seconds += now - self._clock
        self._seconds += now - self._clock
        self._clock = now
        last = self.pending_metrics[-1]
        self._tokens += sum(entry["tokens"] for entry in self.pending_metrics)
        updates = last["step"] - int(last.get("skipped", 0))  # a skipped step leaves the schedule where it is
        entry = {
            "step": last["step"],
            "loss": _mean(self.pending_metrics, "loss"),
            "accuracy": _mean(self.pending_metrics, "accuracy"),
            "tokens": self._tokens,
            "learning_rate": float(np.asarray(self._schedule(max(updates - 1, 0)))),
            "grad_norm": last["grad_norm"],
            "seconds": round(self._seconds, 3),
        }
        entry |= {name: last[name] for name in ("loss_scale", "skipped") if name in last} | extra
        if self._timed_seconds > 0 and self._timed_tokens > 0:
            entry["tokens_per_second"] = round(self._timed_tokens / self._timed_seconds, 1)
        entry = {name: value for name, value in entry.items() if math.isfinite(value)}  # JSON knows no others
        if self._folder is not None:
            self._folder.append_metrics(entry)
        for write in self._writers:
            write(entry)
        self.history.append(entry)
        self.pending_metrics, self._timed_tokens, self._timed_seconds = [], 0.0, 0.0
        return entry

    def _check(self, step: int, values: dict[str, float]) -> None:
        if self._config.compute_dtype == "float16":
            if math.isfinite(values["grad_norm"]):
                self._last_finite = step
            elif values["loss_scale"] <= MIN_SCALE:
                raise NonFiniteError(
                    step,
                    f"loss {values['loss']}, its gradient overflows at the smallest loss scale too, {MIN_SCALE}; "
                    "bfloat16 and float32 don't overflow so soon, and a lower learning_rate may help",
                    first=self._last_finite + 1,
                )
        elif not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise NonFiniteError(
                step,
                f"loss {values['loss']}, gradient norm {values['grad_norm']}; "
                "a lower learning_rate or a longer warmup_steps helps as a rule",
            )


def _mean(steps: list[dict[str, float]], name: str) -> float:
    """Return the mean per token."""
    return sum(e[name] * e["tokens"] for e in steps) / max(sum(e["tokens"] for e in steps), 1.0)
