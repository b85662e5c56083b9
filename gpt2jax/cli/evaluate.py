"""`gpt2jax evaluate`: loss, accuracy and the figures of Keras of one model."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, arg

from gpt2jax.cli.common import check_file, check_folder, command_line, run_command
from gpt2jax.cli.options import (
    DataOptions,
    EvaluationOptions,
    TextOptions,
    evaluation_config,
    warn_if_trained_on,
)
from gpt2jax.utils.home_folder import abbreviate_home
from gpt2jax.utils.notices import printable


@dataclasses.dataclass(frozen=True)
class Options:
    """Loss and accuracy of a model on texts.

    $ gpt2jax evaluate --model gpt2 --data my-texts
    $ gpt2jax evaluate --model runs/mine --data my.jsonl --eval-split test --out figures.json

    Attributes:
        model: gpt2-mini, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a hub id, or a path (a run folder, too).
        source: of the texts.
        eval_split: which texts, in the split syntax of `datasets`: test, "test[:100]", all. Default: the test split, or
            else the validation split, if the data has it by name; all texts of other data.
        text: how texts become tokens.
        evaluation: settings of the evaluation.
        seed: has no effect; every command takes it, and an evaluation draws nothing at random.
        out: a file (*.json) for the figures, or a folder for evaluation.json and the state that --resume needs.
        resume: continue an evaluation into that folder that was killed.
        overwrite: replace the file, or the evaluation in the folder.
    """

    model: str = "gpt2-mini"
    source: Annotated[DataOptions, OmitArgPrefixes, arg(name="data")] = dataclasses.field(
        default_factory=DataOptions
    )
    eval_split: str | None = None
    text: Annotated[TextOptions, OmitArgPrefixes, arg(name="tokenizer")] = TextOptions()
    evaluation: Annotated[EvaluationOptions, OmitArgPrefixes, arg(name="evaluation")] = EvaluationOptions()
    seed: int = 0
    out: pathlib.Path | None = None
    resume: bool = False
    overwrite: bool = False


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_command("evaluate", Options, run, argv)


def run(options: Options) -> None:
    """Load a model, evaluate it, and print and write the figures."""
    from rich.console import Console

    from gpt2jax.comparison.provenance import describe_model, versions
    from gpt2jax.evaluation.evaluate import evaluate
    from gpt2jax.evaluation.result import SCHEMA, SCHEMA_VERSION
    from gpt2jax.utils.atomic_io import atomic_write

    evaluation = evaluation_config(options.evaluation, [options.model])
    file, state = output_files(options)
    options.text.check(options.model)
    source = options.source.pinned()
    split = options.eval_split or source.held_out_split()
    warn_if_trained_on(options.model, source, split)
    model = options.text.load(options.model)
    result = evaluate(
        model,
        source.iterate(split, limit=source.limit),
        evaluation,
        state=state,
        resume=options.resume,
        progress=True,
    )
    figures = result.as_dict()
    described, origin = source.describe(split, result.documents)
    Console().print(figures_table(f"{options.model} on {described}", figures))
    print(f"Scored: {result.description}.")
    if file is not None:
        content = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            **figures,
            "model": describe_model(model),
            "data": {
                "documents": result.documents,
                "sha256": result.data_sha256,
                **origin,
            },
            "versions": versions(),
            "command": command_line("evaluate"),
            "seconds": round(result.seconds, 3),
        }
        with atomic_write(file) as stream:
            json.dump(abbreviate_home(content), stream, indent=2, allow_nan=False)
        print(f"wrote {printable(str(file))}")


def output_files(options: Options) -> tuple[pathlib.Path | None, pathlib.Path | None]:
    """Return the file for the figures and the file for the state."""
    if options.out is None or options.out.suffix == ".json":
        if options.resume:
            raise ValueError("--resume must come with the folder of an evaluation; add --out FOLDER")
        if options.out is not None:
            check_file(options.out, overwrite=options.overwrite)
        return options.out, None
    check_folder(options.out)
    file, state = options.out / "evaluation.json", options.out / "state.npz"
    if (file.exists() or state.exists()) and not (options.resume or options.overwrite):
        raise FileExistsError(
            f"--out {options.out} holds an evaluation; --resume it, --overwrite it, or choose another folder"
        )
    return file, state


def figures_table(title: str, figures: dict[str, Any]) -> Any:
    """Return the figures that are single values as a table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(title)), title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        if value is None and name in ("loss", "perplexity"):
            table.add_row(name, "not finite")
        if isinstance(value, (int, float, str)) and name != "description":
            table.add_row(name, f"{value:.6f}" if isinstance(value, float) else str(value))
    return table
