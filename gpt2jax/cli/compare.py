"""`gpt2jax compare`: several models on the same texts, with a report."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import tyro

from gpt2jax.cli.common import (
    DataOptions,
    check_folder,
    command_line,
    default_prompts,
    row_length,
    run_command,
    say,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare models on the same texts: figures with error bars, generated text side by side, a report.

    Attributes:
        models: two or more, each NAME=MODEL or MODEL: gpt2-mini, gpt2, ..., a hub id, or a path. The first is what
            the others are compared with.
        source: of the texts.
        split: which of them; "all" for everything.
        sequence_length: tokens of one row. Default: 128, or the shortest context if that is less.
        batch_size: rows at once.
        windows: "first" (the first tokens of each text, as the study did), "disjoint", "sliding" or "rolling" (all of
            each text, the last as lm-evaluation-harness counts it).
        stride: of sliding windows. Default: half the sequence length.
        compute_dtype: operands of matrix products.
        training_data: where the models' training texts come from (as --data); the report says how much of the texts
            stands in them.
        training_split: which of these.
        prompts: prompts for the generated texts. Default: a set that suits the data.
        max_new_tokens: length of the generated texts.
        top_k: draw among so many of the likeliest tokens; 0 for all.
        seed: of the generated texts and the bootstrap.
        out: folder for report.html, report.md and comparison.json.
        overwrite: replace a comparison that the folder holds.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    source: DataOptions = dataclasses.field(default_factory=DataOptions)
    split: Literal["train", "validation", "test", "all"] = "test"
    sequence_length: int | None = None
    batch_size: int = 32
    windows: Literal["first", "disjoint", "sliding", "rolling"] = "first"
    stride: int | None = None
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    training_data: str | None = None
    training_split: Literal["train", "validation", "test", "all"] = "train"
    prompts: tuple[str, ...] | None = None
    max_new_tokens: int = 100
    top_k: int = 5
    seed: int = 0
    out: pathlib.Path = pathlib.Path("comparison")
    overwrite: bool = False


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    run_command("compare", Options, run, argv)


def run(options: Options) -> None:
    """Loads, compares, writes, and says where."""
    from rich.console import Console

    from gpt2jax.comparison.compare import compare
    from gpt2jax.loading import load
    from gpt2jax.report.summary import print_comparison

    names = named_models(options.models)
    check_folder(options.out)
    if (options.out / "comparison.json").exists() and not options.overwrite:
        raise FileExistsError(
            f"{options.out} holds a comparison; choose another folder with --out, or --overwrite"
        )
    source = options.source.pinned()
    models = {name: load(model) for name, model in names.items()}
    texts = source.texts(options.split, limit=source.limit)
    context = min(model.config.n_positions for model in models.values())
    comparison = compare(
        models,
        texts,
        prompts=options.prompts or default_prompts(source.data),
        sequence_length=row_length(options.sequence_length, context),
        batch_size=options.batch_size,
        windows=options.windows,
        stride=options.stride,
        compute_dtype=options.compute_dtype,
        training_texts=training_texts(options, source),
        max_new_tokens=options.max_new_tokens,
        top_k=options.top_k or None,
        seed=options.seed,
        command=command_line("compare"),
        source=source.origin(options.split),
        progress=True,
    )
    comparison.save(options.out)
    console = Console()
    print_comparison(comparison, console)
    say(console, "wrote", f"{options.out}/report.html, report.md, comparison.json")


def training_texts(options: Options, source: DataOptions) -> Iterator[str] | None:
    """The texts that --training-data names; from the same data set, they are of the same commit."""
    if options.training_data is None:
        return None
    if options.training_data != source.data:
        source = dataclasses.replace(source, data=options.training_data, data_revision=None)
    return source.iterate(options.training_split)


def named_models(arguments: Sequence[str]) -> dict[str, str]:
    """NAME=MODEL and MODEL arguments as name to model."""
    if len(arguments) < 2:
        raise ValueError(f"compare takes two models or more, not {len(arguments)}: for one there is evaluate")
    names: dict[str, str] = {}
    for argument in arguments:
        name, equals, model = argument.rpartition("=")
        name = name if equals else pathlib.PurePath(argument).name
        if not name or not model:
            raise ValueError(f"{argument!r} names no model: write NAME=MODEL or MODEL")
        if name in names:
            raise ValueError(f"two models are named {name!r}: write NAME=MODEL to tell them apart")
        names[name] = model
    return names
