"""What a person sees of a training run: a bar with loss, speed and time left, or plain lines in a log file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gpt2jax.utils.progress import redraws

Report = Callable[[int, dict[str, float]], None]


@contextlib.contextmanager
def training_progress(steps: int, start: int, *, show: bool = True) -> Iterator[Report]:
    """Yields `report(step, metrics)`: draws the bar on a terminal, prints a line per logged step elsewhere."""
    if not show:
        yield lambda step, metrics: None
    elif not redraws():
        yield _print_line(steps)
    else:
        columns = (
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("training", total=steps, completed=start, figures="compiling ...")
            yield lambda step, metrics: progress.update(task, completed=step, figures=figures(metrics))


def figures(metrics: dict[str, float]) -> str:
    """The figures of one logged step in a few words."""
    parts = [f"loss {metrics['loss']:.3f}"] if "loss" in metrics else []
    if "validation_loss" in metrics:
        parts.append(f"validation {metrics['validation_loss']:.3f}")
    if "tokens_per_second" in metrics:
        parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    if metrics.get("skipped"):
        parts.append(f"{metrics['skipped']:.0f} skipped")
    return "  ".join(parts)


def _print_line(steps: int) -> Report:
    return lambda step, metrics: print(
        f"step {step}/{steps}  {figures(metrics)}", file=sys.stderr, flush=True
    )
