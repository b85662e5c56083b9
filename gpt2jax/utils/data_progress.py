"""What a person sees while texts are tokenized."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gpt2jax.utils.progress import redraws

SHOWN_AFTER = 1.0  # seconds; what is done sooner needs no line

Count = Callable[[int, int, int], None]


@contextlib.contextmanager
def tokenization_progress(texts: Iterable[Any], *, show: bool) -> Iterator[Count]:
    """Yields `count(documents, characters, tokens)`, to be called for each piece that is done.

    Draws a bar on a terminal; elsewhere prints one line at the end, if it took more than a moment.
    """
    start, sums = time.perf_counter(), [0, 0, 0]

    def add(*counts: int) -> str:
        sums[:] = [total + count for total, count in zip(sums, counts, strict=True)]
        seconds = max(time.perf_counter() - start, 1e-9)
        return f"{sums[1] / 1e6:,.1f} M characters  {sums[2]:,} tokens  {sums[1] / 1e6 / seconds:.1f} M characters/s"

    if not show:
        yield lambda *counts: None
    elif not redraws():
        yield lambda *counts: None if add(*counts) else None
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
