"""What a person sees of long work: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def is_interactive() -> bool:
    """Whether a bar can be drawn: in a notebook with ipywidgets, or on a terminal that is not a dumb one."""
    if Console().is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return (
        sys.stderr is not None
        and sys.stderr.isatty()
        and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
    )


SHOWN_AFTER = 1.0  # seconds; what is done sooner needs no line

Count = Callable[[int, int, int], None]


@contextlib.contextmanager
def tokenization_progress(texts: Iterable[Any], *, show: bool) -> Iterator[Count]:
    """Yield `count(documents, characters, tokens)`, to be called for each piece that is done.

    Draws a bar on a terminal; elsewhere prints one line at the end, if it took more than a moment.
    """
    start, sums = time.perf_counter(), [0, 0, 0]

    def add(*counts: int) -> str:
        sums[:] = [total + count for total, count in zip(sums, counts, strict=True)]
        seconds = max(time.perf_counter() - start, 1e-9)
        return f"{sums[1] / 1e6:,.1f} M characters  {sums[2]:,} tokens  {sums[1] / 1e6 / seconds:.1f} M characters/s"

    if not show:
        yield lambda *counts: None
    elif not is_interactive():

        def count(*counts: int) -> None:
            add(*counts)

        yield count
        if time.perf_counter() - start > SHOWN_AFTER:
            print(f"tokenized {sums[0]:,} documents  {add(0, 0, 0)}", file=sys.stderr, flush=True)
    else:
        columns = (
            TextColumn("[bold]tokenizing"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            total = len(texts) if hasattr(texts, "__len__") else None  # pyright: ignore[reportArgumentType]
            task = progress.add_task("tokenizing", total=total, figures="")
            yield lambda *counts: progress.update(task, advance=counts[0], figures=add(*counts))


Report = Callable[[int, dict[str, float]], None]


@contextlib.contextmanager
def training_progress(steps: int, start: int, *, show: bool = True) -> Iterator[Report]:
    """Yield `report(step, metrics)`: draws the bar on a terminal, prints a line per logged step elsewhere."""
    if not show:
        yield lambda step, metrics: None
    elif not is_interactive():
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
    """Format the figures of one logged step."""
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


@contextlib.contextmanager
def evaluation_progress(total: int | None, done: int, show: bool) -> Iterator[Callable[[float], None]]:
    """Yield `advance(documents)`, which moves a bar on a terminal and does nothing elsewhere."""
    if not (show and is_interactive()):
        yield lambda documents: None
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("evaluating", total=total, completed=done)
        yield lambda documents: progress.advance(task, documents)
