"""`gpt2jax evaluate`: loss, accuracy and the study's two figures of one model."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Literal

from gpt2jax.cli.common import DataOptions, run_command


@dataclasses.dataclass(frozen=True)
class Options:
    """Loss and accuracy of a model on texts.

    Attributes:
        model: gpt2-mini, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a hub id, or a path (a run folder, too).
        source: of the texts.
        split: which of them; "all" for everything.
        sequence_length: tokens of one row. Default: 128, or the model's context if that is less.
        batch_size: rows at once.
        windows: "first" (the first tokens of each text, as the study did), "disjoint" or "sliding" (all of each text).
        stride: of sliding windows. Default: half the sequence length.
        compute_dtype: operands of matrix products.
        seed: taken for the sake of uniformity; an evaluation draws nothing at random.
        out: write the figures to this JSON file.
    """

    model: str = "gpt2-mini"
    source: DataOptions = dataclasses.field(default_factory=DataOptions)
    split: Literal["train", "validation", "test", "all"] = "test"
    sequence_length: int | None = None
    batch_size: int = 32
    windows: Literal["first", "disjoint", "sliding"] = "first"
    stride: int | None = None
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0
    out: pathlib.Path | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    run_command("evaluate", Options, run, argv)


def run(options: Options) -> None:
    """Loads, evaluates, prints."""
    from rich.console import Console
    from rich.table import Table

    from gpt2jax.evaluation.metrics import evaluate
    from gpt2jax.files import atomic_write
    from gpt2jax.language_model import load

    model = load(options.model)
    texts = options.source.texts(options.split, limit=options.source.limit)
    result = evaluate(
        model,
        texts,
        sequence_length=options.sequence_length or min(128, model.config.n_positions),
        batch_size=options.batch_size,
        windows=options.windows,
        stride=options.stride,
        compute_dtype=options.compute_dtype,
        progress=True,
    )
    table = Table(title=f"{options.model} on {options.source.data}, {options.split}", title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in result.as_dict().items():
        if isinstance(value, (int, float, str)):
            table.add_row(name, f"{value:.6f}" if isinstance(value, float) else str(value))
    Console().print(table)
    if options.out is not None:
        with atomic_write(options.out) as file:
            json.dump(result.as_dict(), file, indent=2)
        print(f"wrote {options.out}")
