"""`gpt2jax compare`: several models on the same texts, with a report."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any

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
    run_description,
    warn_if_trained_on,
)
from gpt2jax.utils.validation import must_be, validated

if TYPE_CHECKING:
    from gpt2jax.data.sources import Texts


# the settings of a run that a report tells, and their kinds in run.json
_TOLD: dict[str, Any] = {
    "steps": (int, NoneType),
    "epochs": (int, float),
    "batch_size": int,
    "sequence_length": (int, NoneType),
    "optimizer": str,
    "compute_dtype": str,
}


@validated
@dataclasses.dataclass(frozen=True)
class ComparedDataOptions(DataOptions):
    """Where texts come from: one data set or several.

    Attributes:
        data: a file, a folder, a quoted pattern, a hub data set, or one of the names that `gpt2jax evaluate --help`
            lists; several data sets are compared one by one.
    """

    data: tuple[str, ...] = (DataOptions.data,)  # pyright: ignore[reportIncompatibleVariableOverride]

    def each(self) -> list[DataOptions]:
        """Return the options of each data set, those of hub data sets with the commit of now.

        Raises:
            ValueError: no data set, one is named twice, or several with --more-data, which belongs to one.
        """
        if not self.data or len(set(self.data)) < len(self.data):
            raise ValueError(must_be("--data", "one or more data sets, each named once", " ".join(self.data)))
        if len(self.data) > 1 and self.more_data:
            hint = "; it adds files to the texts of one --data"
            raise ValueError(must_be("--more-data", "absent with several --data", self.more_data[0]) + hint)
        return [DataOptions(**{**vars(self), "data": name}).pinned() for name in self.data]


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare models on the same texts: figures with error bars, generated text side by side, a report.

    The generated texts have at most 100 new tokens; --max-new-tokens or --max-length gives another length.

    Several splits, or several --data, give a table each in one report; --more-data joins files to one set of texts.

    $ gpt2jax compare gpt2 mine=runs/mine --data my-texts --eval-split validation test
    $ gpt2jax compare gpt2 first=runs/first second=runs/second --data held-out.jsonl --out report

    Attributes:
        models: two or more, each NAME=MODEL or MODEL: gpt2-mini, gpt2, ..., a hub id, or a path. The others are
            compared with the first.
        source: of the texts.
        text: how texts become tokens, the same for all models.
        eval_split: which texts, in the split syntax of `datasets`: test, "test[:100]", all; several are compared one
            by one. Default: the test split, or else the validation split, if the data has it by name; all texts of
            other data.
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
    source: Annotated[ComparedDataOptions, OmitArgPrefixes, arg(name="data")] = dataclasses.field(
        default_factory=ComparedDataOptions
    )
    text: Annotated[TextOptions, OmitArgPrefixes, arg(name="tokenizer")] = TextOptions()
    eval_split: Annotated[tuple[str, ...], arg(aliases=("--split",))] = ()
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
    sources = options.source.each()
    models = {name: options.text.load(model) for name, model in names.items()}
    console = Console()
    texts, origins = {}, {}
    for name, (source, split) in named_splits(sources, options.eval_split).items():
        texts[name] = source.texts(split, limit=source.limit)
        described, origins[name] = source.describe(split, len(texts[name]))
        print_line(console, "texts", described)
        for model in names.values():
            warn_if_trained_on(model, source, split)
    is_single = len(texts) == 1
    comparison = compare(
        models,
        *(texts.values() if is_single else [texts]),
        prompts=options.prompts or default_prompts(sources[0].data),
        evaluation=evaluation,
        generation=options.generation.config(),
        training_texts=training_texts(options, sources),
        seed=options.seed,
        command=command_line("compare"),
        source=next(iter(origins.values())) if is_single else origins,
        progress=True,
    )
    if trained := trainings(names):
        comparison = dataclasses.replace(comparison, settings=comparison.settings | {"trained": trained})
    comparison.save(options.out)
    print_comparison(comparison, console)
    print_line(console, "wrote", f"{options.out}/report.html, report.md, comparison.json")


def trainings(models: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return what the runs among models by name were trained from, on what and how, where `run.json` tells it."""
    found = {}
    for name, model in models.items():
        run = run_description(model)
        settings, data = run.get("finetune", {}), run.get("data", {})
        is_whole = all(isinstance(settings.get(key), kinds) for key, kinds in _TOLD.items())
        if is_whole and isinstance(data.get("documents"), int):
            settings = {key: value for key, value in settings.items() if key != "token_cache"}
            found[name] = {"base_model": run.get("base_model"), "data": data, "settings": settings}
    return found


def named_splits(sources: Sequence[DataOptions], splits: Sequence[str]) -> dict[str, tuple[DataOptions, str]]:
    """Return the data sets with their splits, by names that tell them apart.

    Raises:
        ValueError: a split is named twice.
    """
    if len(set(splits)) < len(splits):
        raise ValueError(must_be("--eval-split", "splits, each named once", " ".join(splits)))
    places = [pathlib.PurePath(source.data).name or source.data for source in sources]
    if len(set(places)) < len(places):  # the same name in different folders
        places = [source.data for source in sources]
    found = {}
    for place, source in zip(places, sources, strict=True):
        for split in splits or (source.held_out_split(),):
            parts = ([place] if len(sources) > 1 else []) + ([split] if len(splits) > 1 else [])
            found[", ".join(parts)] = (source, split)
    return found


def training_texts(options: Options, sources: Sequence[DataOptions]) -> Texts | None:
    """Return the texts of --training-data; those of a data set that is compared on are from the same commit."""
    if options.training_data is None:
        return None
    other = dataclasses.replace(sources[0], data=options.training_data, more_data=(), data_revision=None)
    source = next((source for source in sources if source.data == options.training_data), other)
    return source.iterate(options.train_split)


def named_models(arguments: Sequence[str]) -> dict[str, str]:
    """Parse NAME=MODEL and MODEL arguments into models by name."""
    if len(arguments) < 2:
        hint = "for one model use evaluate; all models stand before the options"
        raise ValueError(f"models must be at least two, got {len(arguments)}; {hint}")
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
