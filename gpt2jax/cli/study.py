"""`gpt2jax study`: evaluate, fine-tune in stages, evaluate each, generate with each, write one report."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from gpt2jax.cli.common import check_folder, command_line, print_line, run_command
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
    """Repeat the whole study: evaluate a model on validation and test, fine-tune it in stages, evaluate and generate
    after each, and write one report beside the study's published figures.

    Without options: gpt2-mini on the documentation of the installed numerical packages. The second example is the study
    itself, on a GPU.

    $ gpt2jax study --limit 300 --out runs/study
    $ gpt2jax study --model gpt2 --data pubmed --compute-dtype float16 --out runs/pubmed

    All documents of the splits train, validation and test are used. The texts are at most 200 tokens long, prompt
    included, if --max-new-tokens and --max-length say nothing else.

    Attributes:
        model: gpt2-mini, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a hub id, or a path.
        source: of the texts; --limit holds for each split.
        text: how texts become tokens.
        stages: equal parts of the training texts; each is trained on from the last one's weights.
        out: folder for the stages, study.json and the report. Default: runs/study-MODEL-DATA.
        resume: go on where a killed or interrupted study in that folder stopped.
        overwrite: delete the study that the folder holds.
        packing: "padded" trains on the first tokens of each text, as the study did; "concat" and "packed" on all.
        train: settings of each stage. The default length is 128, or the model's context if that is less; evaluation
            and training have the same length and dtype.
        lora: train low-rank adapters instead of all parameters. Any --lora.* option implies it.
        lora_settings: settings of the adapters.
        prompts: prompts for the generated texts. Default: the eight of the study's kind.
        generation: settings of the generated texts.
    """

    model: str = "gpt2-mini"
    source: Annotated[DataOptions, tyro.conf.arg(name="")] = DataOptions()
    text: Annotated[TextOptions, tyro.conf.arg(name="")] = TextOptions()
    stages: int = 2
    out: pathlib.Path | None = None
    resume: bool = False
    overwrite: bool = False
    packing: Literal["concat", "packed", "padded"] = "padded"
    train: Annotated[StageOptions, tyro.conf.arg(name="")] = StageOptions()
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
    from gpt2jax.studies.study import SPLITS, STUDY_FILE, study
    from gpt2jax.studies.tables import study_tables

    config = study_config(options)
    output = options.out or default_output(options)
    check_folder(output)
    if (output / STUDY_FILE).exists() and not (options.resume or options.overwrite):
        raise FileExistsError(
            f"--out {output} holds a study; --resume it, --overwrite it, or choose another folder"
        )
    console = Console()
    model = options.text.load(options.model)
    print_line(console, "model", repr(model))
    source = options.source.pinned()
    texts = {split: source.texts(split, limit=source.limit) for split in SPLITS}
    counts = ", ".join(f"{len(found):,} of split {split}" for split, found in texts.items())
    print_line(console, "texts", f"documents of {source.data}: {counts}")
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
    for table in study_tables(found.results):
        # one column a model where that is narrower, as `compare` prints it
        is_wide = table.columns[0] == "Model" and len(table.rows) < len(table.columns)
        print_table(transpose(table) if is_wide else table, console)
    print_line(console, "wrote", f"{output}: report.html, report.md, comparison.json, study.json")


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
            "lora": options.lora_settings.config() if options.lora else None,
            "token_cache": None if cache is None else str(cache),
        }
    )
    prompts = StudyConfig.prompts if options.prompts is None else options.prompts
    return StudyConfig(options.stages, training, generation=options.generation, prompts=prompts)


def default_output(options: Options) -> pathlib.Path:
    """Return runs/study-MODEL-DATA, from the last parts of the two names."""
    names = (options.model, options.source.data)
    parts = [pathlib.PurePath(name).name.split(".")[0] or "model" for name in names]
    return pathlib.Path("runs") / "-".join(["study", *parts])
