"""`gpt2jax compare`: several models on the same texts, with a report."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import OmitArgPrefixes, arg

from gpt2jax.cli.common import check_folder, command_line, print_line, run_command
from gpt2jax.cli.options import (
    ComparedTextOptions,
    DataOptions,
    EvaluationOptions,
    TextOptions,
    default_prompts,
    evaluation_config,
    warn_if_trained_on,
)

if TYPE_CHECKING:
    from gpt2jax.data.sources import Texts


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare models on the same texts: figures with error bars, generated text side by side, a report.

    The generated texts have at most 100 new tokens; --max-new-tokens or --max-length gives another length.

    $ gpt2jax compare gpt2 mine=runs/mine --data my-texts --eval-split test
    $ gpt2jax compare gpt2 first=runs/first second=runs/second --data held-out.jsonl --out report

    Attributes:
        models: two or more, each NAME=MODEL or MODEL: gpt2-mini, gpt2, ..., a hub id, or a path. The others are
            compared with the first.
        source: of the texts.
        text: how texts become tokens, the same for all models.
        eval_split: which texts, in the split syntax of `datasets`: test, "test[:100]", all. Default: the test split, or
            else the validation split, if the data has it by name; all texts of other data.
        evaluation: settings of the evaluation. The default length is that of the shortest context, at most 128.
        training_data: where the models' training texts come from (as --data); the report then says how much of the
            texts is in them.
        train_split: which training texts, in the same syntax.
        prompts: prompts for the generated texts. Default: prompts that suit the data.
        generation: settings of the generated texts, the same for all models: generation_config.json beside the weights
            has no effect.
        seed: of the generated texts and the bootstrap.
        out: folder for report.html, report.md and comparison.json.
        overwrite: replace a comparison in the folder.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    source: Annotated[DataOptions, OmitArgPrefixes, arg(name="data")] = dataclasses.field(
        default_factory=DataOptions
    )
    text: Annotated[TextOptions, OmitArgPrefixes, arg(name="tokenizer")] = TextOptions()
    eval_split: str | None = None
    evaluation: Annotated[EvaluationOptions, OmitArgPrefixes, arg(name="evaluation")] = EvaluationOptions()
    training_data: str | None = None
    train_split: str = "train"
    prompts: tuple[str, ...] | None = None
    generation: Annotated[ComparedTextOptions, OmitArgPrefixes, arg(name="generation")] = (
        ComparedTextOptions()
    )
    seed: int = 0
    out: pathlib.Path = pathlib.Path("comparison")
    overwrite: bool = False


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_command("compare", Options, run, argv)


def run(options: Options) -> None:
    """Load the models, compare them, and write the report."""
    from rich.console import Console

    from gpt2jax.comparison.compare import compare
    from gpt2jax.report.summary import print_comparison

    names = named_models(options.models)
    evaluation = evaluation_config(options.evaluation, list(names.values()))
    check_folder(options.out)
    if (options.out / "comparison.json").exists() and not options.overwrite:
        raise FileExistsError(
            f"--out {options.out} holds a comparison; --overwrite it, or choose another folder"
        )
    options.text.check(*names.values())
    source = options.source.pinned()
    models = {name: options.text.load(model) for name, model in names.items()}
    split = options.eval_split or source.held_out_split()
    texts = source.texts(split, limit=source.limit)
    described, origin = source.describe(split, len(texts))
    console = Console()
    print_line(console, "texts", described)
    for model in names.values():
        warn_if_trained_on(model, source, split)
    comparison = compare(
        models,
        texts,
        options.prompts or default_prompts(source.data),
        evaluation,
        options.generation.config(),
        training_texts=training_texts(options, source),
        seed=options.seed,
        command=command_line("compare"),
        source=origin,
        progress=True,
    )
    comparison.save(options.out)
    print_comparison(comparison, console)
    print_line(console, "wrote", f"{options.out}/report.html, report.md, comparison.json")


def training_texts(options: Options, source: DataOptions) -> Texts | None:
    """Return the texts of --training-data; those of the same data set are from the same commit."""
    if options.training_data is None:
        return None
    if options.training_data != source.data:
        source = dataclasses.replace(source, data=options.training_data, more_data=(), data_revision=None)
    return source.iterate(options.train_split)


def named_models(arguments: Sequence[str]) -> dict[str, str]:
    """Parse NAME=MODEL and MODEL arguments into models by name."""
    if len(arguments) < 2:
        raise ValueError(f"models must be at least two, got {len(arguments)}; for one model use evaluate")
    names: dict[str, str] = {}
    for argument in arguments:
        name, equals, model = argument.rpartition("=")
        name = name if equals else pathlib.PurePath(argument).name
        if not name or not model:
            raise ValueError(f"models must be NAME=MODEL or MODEL each, got {argument!r}")
        if name in names:
            raise ValueError(f"names of models must be unique, got {name!r} twice; write NAME=MODEL")
        names[name] = model
    return names
