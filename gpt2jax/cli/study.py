"""`gpt2jax study`: evaluate, fine-tune in stages, evaluate each, generate with each, write one report."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gpt2jax.cli.common import check_folder, command_line, print_line, run_command
from gpt2jax.cli.compare import named_models
from gpt2jax.cli.finetune import AdapterOptions, TrainOptions, imply_lora
from gpt2jax.cli.options import DataOptions, GenerationOptions, TextOptions
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.utils.validation import must_be

if TYPE_CHECKING:
    from gpt2jax.studies.config import StudyConfig


@dataclasses.dataclass(frozen=True)
class StageOptions(TrainOptions):
    """The settings of each stage; three epochs, as in the study."""

    __doc__ = FinetuneConfig.__doc__
    epochs: float = 3.0


@dataclasses.dataclass(frozen=True)
class StudyTextOptions(GenerationOptions):
    """The settings of the generated texts, of which each prompt gets one."""

    __doc__ = GenerationOptions.__doc__
    num_return_sequences: tyro.conf.Suppress[int] = 1


@dataclasses.dataclass(frozen=True)
class Options:
    """Repeat the whole study: evaluate models on validation and test, fine-tune them in stages, evaluate and generate
    after each, and write one report beside the study's published figures.

    Without options: gpt2-mini on the documentation of the installed numerical packages. The second example is the study
    itself, on a GPU, and beside it a larger model and adapters: the report shows what each gains and costs.

    $ gpt2jax study --limit 300 --out runs/study
    $ gpt2jax study --model gpt2 gpt2-medium --methods full lora --data pubmed --compute-dtype float16

    All documents of the splits train, validation and test are used. The texts are at most 200 tokens long, prompt
    included, if --max-new-tokens and --max-length say nothing else.

    Attributes:
        model: gpt2-mini, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a hub id, or a path; or several, each MODEL or
            NAME=MODEL, which are loaded one after the other.
        source: of the texts; --limit holds for each split.
        text: how texts become tokens.
        stages: equal parts of the training texts; each is trained on from the last one's weights.
        out: folder for the stages, study.json and the report. Default: runs/study-MODEL-DATA.
        resume: go on where a killed or interrupted study in that folder stopped.
        overwrite: delete the study that the folder holds.
        packing: "padded" trains on the first tokens of each text, as the study did; "concat" and "packed" on all.
        train: settings of each stage. The default length is 128, or the model's context if that is less; evaluation
            and training have the same length and dtype.
        methods: what is trained, for each model: full (all parameters), lora (adapters), or both. Default: full, or
            lora with --lora.
        lora: train low-rank adapters instead of all parameters. Any --lora.* option implies it.
        lora_settings: settings of the adapters.
        prompts: prompts for the generated texts. Default: the eight of the study's kind.
        generation: settings of the generated texts.
    """

    model: tuple[str, ...] = ("gpt2-mini",)
    source: Annotated[DataOptions, tyro.conf.arg(name="")] = DataOptions()
    text: Annotated[TextOptions, tyro.conf.arg(name="")] = TextOptions()
    stages: int = 2
    out: pathlib.Path | None = None
    resume: bool = False
    overwrite: bool = False
    packing: Literal["concat", "packed", "padded"] = "padded"
    train: Annotated[StageOptions, tyro.conf.arg(name="")] = StageOptions()
    methods: tuple[Literal["full", "lora"], ...] = ()
    lora: bool = False
    lora_settings: Annotated[AdapterOptions, tyro.conf.arg(name="lora")] = AdapterOptions()
    prompts: tuple[str, ...] | None = None
    generation: Annotated[StudyTextOptions, tyro.conf.arg(name="")] = StudyTextOptions()


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    run_command("study", Options, run, imply_lora("study", argv), prefixes=True)


def run(options: Options) -> None:
    """Load, run the study, print its tables, and say where the report is."""
    from rich.console import Console

    from gpt2jax.report.summary import print_table
    from gpt2jax.report.tables import transpose
    from gpt2jax.studies.folder import STUDY_FILE
    from gpt2jax.studies.study import SPLITS, study
    from gpt2jax.studies.tables import study_tables

    config = study_config(options)
    output = options.out or default_output(options)
    check_folder(output)
    if (output / STUDY_FILE).exists() and not (options.resume or options.overwrite):
        raise FileExistsError(
            f"--out {output} holds a study; --resume it, --overwrite it, or choose another folder"
        )
    console = Console()
    model = _models(options)
    if isinstance(model, dict):
        names = ", ".join(f"{name} ({source})" for name, source in zip(model, options.model, strict=True))
        print_line(console, "models", f"{names}; one after the other")
    else:
        print_line(console, "model", repr(model))
    source = options.source.pinned()
    texts = {split: source.texts(split, limit=source.limit) for split in SPLITS}
    counts = ", ".join(f"{len(found):,} of split {split}" for split, found in texts.items())
    print_line(console, "texts", f"documents of {source.data}: {counts}")
    try:
        found = study(
            model,
            texts,
            config,
            output=output,
            resume=options.resume,
            overwrite=options.overwrite,
            source={"source": source.source, "revision": source.data_revision},
            command=command_line("study"),
        )
    except KeyboardInterrupt as interrupt:
        if str(interrupt):  # from a training, which says what it saved
            raise
        raise KeyboardInterrupt(f"interrupted; --resume goes on with the study in {output}") from None
    for table in study_tables(found.results, found.gains):
        # one column a model where that is narrower, as `compare` prints it
        is_wide = table.columns[0] == "Model" and len(table.rows) < len(table.columns)
        print_table(transpose(table) if is_wide else table, console)
    print_line(console, "wrote", f"{output}: report.html, report.md, comparison.json, study.json")


def _models(options: Options) -> Any:
    """Return what `study` takes: a model, or functions that load several by their names."""
    if not options.model:
        raise ValueError(must_be("--model", "at least one name or path", options.model))
    names = {"": options.model[0]} if len(options.model) == 1 else named_models(options.model)
    options.text.check(*names.values())
    if len(names) == 1:
        return options.text.load(options.model[0])
    return {name: functools.partial(options.text.load, model) for name, model in names.items()}


def study_config(options: Options) -> StudyConfig:
    """Build the settings of the study."""
    from gpt2jax.data.token_cache import default_cache
    from gpt2jax.studies.config import StudyConfig

    if options.stages < 1:
        raise ValueError(must_be("--stages", "a positive whole number", options.stages))
    cache = default_cache()
    training = FinetuneConfig(
        **{
            **vars(options.train),
            "packing": options.packing,
            "lora": options.lora_settings.config() if options.lora or "lora" in options.methods else None,
            "token_cache": None if cache is None else str(cache),
        }
    )
    prompts = StudyConfig.prompts if options.prompts is None else options.prompts
    return StudyConfig(
        options.stages, training, options.methods, generation=options.generation, prompts=prompts
    )


def default_output(options: Options) -> pathlib.Path:
    """Return runs/study-MODEL-DATA, from the names of models that have one, and the last parts of the others."""
    models = (name if equals else model for name, equals, model in (m.rpartition("=") for m in options.model))
    names = (*models, options.source.data)
    parts = [pathlib.PurePath(name).name.split(".")[0] or "model" for name in names]
    return pathlib.Path("runs") / "-".join(["study", *parts])
