"""`gpt2jax finetune`: train, evaluate before and after on held-out texts, generate with both, write a report."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, arg

from gpt2jax.cli.common import check_folder, command_line, exit_with_error, print_line, run_command
from gpt2jax.cli.options import (
    ComparedTextOptions,
    DataOptions,
    ProcessOptions,
    TextOptions,
    count_stages,
    default_prompts,
)
from gpt2jax.lora.config import LoRAConfig
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.utils.validation import check, must_be, positive_int

if TYPE_CHECKING:
    from gpt2jax.data.sources import Texts

# an optimizer step of the default job takes about two seconds on two cores: it is to end within three minutes
DEFAULT_JOB_STEPS = 40
# of a validation, which a run repeats, and of the comparison of the default job
EVAL_DOCUMENTS = 120


@dataclasses.dataclass(frozen=True)
class TrainOptions(FinetuneConfig):
    """The settings of a run, except those whose default depends on other options: `Options` has these."""

    __doc__ = FinetuneConfig.__doc__
    packing: tyro.conf.Suppress[Literal["concat", "packed", "padded"]] = "concat"
    lora: tyro.conf.Suppress[None] = None
    token_cache: tyro.conf.Suppress[str | None] = None

    def __post_init__(self) -> None:
        """Check nothing: rules between fields need those of `Options`, so `finetune_config` checks all of them."""


@dataclasses.dataclass(frozen=True)
class AdapterOptions(LoRAConfig):
    """The settings of adapters before alpha, whose default follows from the rank, is filled in."""

    __doc__ = LoRAConfig.__doc__
    alpha: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]

    def __post_init__(self) -> None:
        """Check nothing; `config` does."""

    def config(self) -> LoRAConfig:
        """Return the settings, checked and complete."""
        return LoRAConfig(**vars(self))


@dataclasses.dataclass(frozen=True)
class Options:
    """Fine-tune a model on texts and show what it gained.

    Without options: gpt2-mini, specialised on the documentation of the installed numerical packages in 40 steps.

    $ gpt2jax finetune --model gpt2 --data my-texts --epochs 3
    $ gpt2jax finetune --model gpt2-medium --data my.jsonl --text-column body --lora

    The generated texts have at most 100 new tokens; --max-new-tokens or --max-length gives another length.

    Attributes:
        model: gpt2-mini, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a hub id, or a path.
        out: folder for metrics, checkpoints, the model and the report. Default: runs/MODEL-DATA.
        lora: train low-rank adapters instead of all parameters. Any --lora.* option implies it.
        resume: go on where a killed or interrupted run in that folder stopped, or make it longer with --steps.
        overwrite: delete the run that the folder holds.
        compare: evaluate the model before and after and write the report.
        prompts: prompts for the generated texts. Default: a set that suits the data.
        packing: "concat" trains on every token; "packed" too, with several texts in a row kept apart; "padded" trains
            on the first tokens of each text. Default: "padded" for scientific_papers (pubmed, arxiv), by whatever name
            or path, as in the Keras baseline; else "concat".
        train_split: what is trained on, with the syntax of the datasets library: train, "train[:50%]", train+test.
        validation_split: what is evaluated during the training.
        eval_split: what the comparison is made on. Default: test; of --eval-data what `evaluate` takes of it.
        eval_data: data of your own for the comparison, as --data: a file, a folder, ...; the validation stays with a
            split of --data.
        eval_documents: at most so many documents of the comparison, and of the validation. Default: for the comparison
            all, as `compare` takes (numeric-docs: 120); for the validation, which is repeated, 120.
        prompt_column: column whose texts are context only, with --completion-column.
        completion_column: column whose texts are learned.
        init: "random" trains a model of that name's shape from scratch.
        cache_tokens: keep the tokenized texts for later runs, in $GPT2JAX_CACHE or the user's cache folder.
        source: of the texts.
        train: settings of the run.
        generation: settings of the generated texts, the same for both models: generation_config.json beside the
            weights has no effect.
        lora_settings: settings of the adapters.
        text: how texts become tokens.
        distributed: processes that train together.
    """

    model: str = "gpt2-mini"
    out: pathlib.Path | None = None
    lora: bool = False
    resume: bool = False
    overwrite: bool = False
    compare: bool = True
    prompts: tuple[str, ...] | None = None
    packing: Literal["concat", "packed", "padded"] | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    eval_split: str | None = None
    eval_data: str | None = None
    eval_documents: int | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    init: Literal["pretrained", "random"] = "pretrained"
    cache_tokens: bool = True
    source: Annotated[DataOptions, OmitArgPrefixes, arg(name="data")] = DataOptions()
    train: Annotated[TrainOptions, OmitArgPrefixes, arg(name="training")] = TrainOptions()
    generation: Annotated[ComparedTextOptions, OmitArgPrefixes, arg(name="generation")] = (
        ComparedTextOptions()
    )
    lora_settings: Annotated[AdapterOptions, tyro.conf.arg(name="lora")] = AdapterOptions()
    text: Annotated[TextOptions, OmitArgPrefixes, arg(name="tokenizer")] = TextOptions()
    distributed: Annotated[ProcessOptions, OmitArgPrefixes, arg(name="several processes")] = ProcessOptions()


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    run_command("finetune", Options, run, imply_lora("finetune", argv), prefixes=True)


def imply_lora(command: str, argv: Sequence[str]) -> list[str]:
    """Add --lora to arguments with settings of adapters, which would have no effect without it."""
    settings = [word.partition("=")[0] for word in argv if word.startswith("--lora.")]
    if settings and "--no-lora" in argv:
        exit_with_error(command, f"{settings[0]} does not go with --no-lora")
    return [*argv, "--lora"] if settings and "--lora" not in argv else list(argv)


def run(options: Options) -> None:
    """Load, train, compare, write, and say where."""
    import jax
    from rich.console import Console

    from gpt2jax.comparison.provenance import describe_training
    from gpt2jax.generation.requests import check_prompts
    from gpt2jax.ops.precision import Precision
    from gpt2jax.train.finetune import finetune
    from gpt2jax.train.optimizer import resolve_learning_rate
    from gpt2jax.train.run_folder import RunFolder
    from gpt2jax.train.state import offload_params

    if options.eval_documents is not None:
        check("--eval-documents", options.eval_documents, positive_int)
    options.distributed.initialize()
    console = Console(quiet=jax.process_index() > 0)
    if options.init == "pretrained":
        options.text.check(options.model)
    options = dataclasses.replace(options, source=options.source.pinned())
    config = finetune_config(options)
    output = options.out or default_output(options)
    # refuse before anything long begins
    folder = RunFolder(output, resume=options.resume, overwrite=options.overwrite)
    check_folder(output)
    train_texts = _texts(options, options.train_split, limit=options.source.limit)
    validation_texts = _texts(options, options.validation_split, limit=_held_out_limits(options)[0])
    compared = compared_options(options)
    test_texts = (
        _texts(compared, str(compared.eval_split), limit=_held_out_limits(options)[1])
        if options.compare
        else []
    )
    print_line(
        console, "texts", _describe_texts(options, compared, train_texts, validation_texts, test_texts)
    )
    model = offload_params(starting_model(options), config)
    print_line(console, "model", repr(model))
    print_line(console, "device", Precision.for_device(config.compute_dtype).execution.describe())
    if options.compare:  # what can't be generated is to be known before the training
        check_prompts(model, _prompts(options), options.generation.config())
    result = finetune(
        model,
        train_texts,
        config,
        validation_texts=validation_texts,
        output=folder,
        source=options.source.origin(options.train_split),
    )
    if config.lora is not None:  # its parameters, wherever they were while it trained
        model = dataclasses.replace(result.model, adapters=None, lora=None)
    if options.compare:
        training = describe_training(resolve_learning_rate(config, model.num_parameters()))
        _compare(compared, training, model, result, _plain(test_texts), _plain(train_texts), console)
    files = "report.html, report.md, comparison.json, " if options.compare else ""
    result_folder = "model" if config.lora is None else "adapter"
    print_line(console, "wrote", f"{output}: {files}{result_folder}, checkpoints, metrics.jsonl")
    print_line(console, "space", folder.describe_space())


def compared_options(options: Options) -> Options:
    """Return the options with the data and the split of the comparison.

    Raises:
        ValueError: --eval-data without a comparison.
    """
    if options.eval_data is None:
        return dataclasses.replace(options, eval_split=options.eval_split or "test")
    if not options.compare:
        raise ValueError(must_be("--eval-data", "absent with --no-compare", options.eval_data))
    source = dataclasses.replace(
        options.source, data=options.eval_data, more_data=(), data_revision=None
    ).pinned()
    return dataclasses.replace(
        options, source=source, eval_split=options.eval_split or source.held_out_split()
    )


def _describe_texts(
    options: Options, compared: Options, train_texts: Any, validation_texts: Any, test_texts: Any
) -> str:
    """Say how many documents of which split are used for what."""

    def count(texts: Any, split: str, limit: int | None) -> str:
        if not isinstance(texts, list):
            return f"split {split} as it comes"
        first = "the first " if len(texts) == limit else ""
        return f"{first}{len(texts):,} of split {split}"

    parts = [f"{count(train_texts, options.train_split, options.source.limit)} to train on"]
    limits = _held_out_limits(options)
    parts += [f"{count(validation_texts, options.validation_split, limits[0])} for validation"]
    if options.compare:
        of = "" if options.eval_data is None else f" of {options.eval_data}"
        parts += [f"{count(test_texts, str(compared.eval_split), limits[1])}{of} for the comparison"]
    return f"documents of {options.source.data}: {', '.join(parts)}"


def _held_out_limits(options: Options) -> tuple[int | None, int | None]:
    """Return the most documents of the validation and of the comparison."""
    is_default_job = options.source.data == "numeric-docs"
    default = EVAL_DOCUMENTS if is_default_job else None
    return options.eval_documents or EVAL_DOCUMENTS, options.eval_documents or default


def _prompts(options: Options) -> Sequence[str]:
    return options.prompts or default_prompts(options.source.data)


def _compare(
    options: Options, training: Any, model: Any, result: Any, texts: Any, training_texts: Any, console: Any
) -> None:
    """Compare the model with the trained one, save the report and print it."""
    from gpt2jax.comparison.compare import compare
    from gpt2jax.report.summary import print_comparison

    length = options.train.sequence_length or min(model.config.n_positions, 1024)
    before, after = stage_names(options.model)
    comparison = compare(
        {before: model, after: result.model},
        texts,
        prompts=_prompts(options),
        sequence_length=length,
        compute_dtype=options.train.compute_dtype,
        training_texts=training_texts,
        generation=options.generation.config(),
        seed=options.train.seed,
        history=result.history,
        command=command_line("finetune"),
        source=options.source.origin(str(options.eval_split)),
        progress=not console.quiet,
    )
    comparison = dataclasses.replace(comparison, settings=comparison.settings | {"training": training})
    if not console.quiet:  # of several processes all compute it, so that none waits for another one
        comparison.save(result.output)
    print_comparison(comparison, console)


def _iterate(options: Options, split: str, limit: int | None = None) -> Texts:
    return options.source.iterate(
        split,
        limit=limit,
        prompt_column=options.prompt_column,
        completion_column=options.completion_column,
    )


def stage_names(model: str) -> tuple[str, str]:
    """Return what the report calls the model that the training begins with, and the trained one."""
    stages = count_stages(model)
    return (f"stage {stages}", f"stage {stages + 1}") if stages else ("generic", "specialised")


def _texts(options: Options, split: str, *, limit: int | None) -> Any:
    """Return texts, or prompts with completions: a list, or a stream for --streaming where it is trained on."""
    texts = _iterate(options, split, limit)
    return texts if options.source.streaming and split == options.train_split else list(texts)


def _plain(texts: Iterable[Any]) -> Iterable[Any]:
    """Return prompts with completions as single texts."""
    plain = (text["prompt"] + text["completion"] if isinstance(text, dict) else text for text in texts)
    return list(plain) if isinstance(texts, list) else plain


def finetune_config(options: Options) -> FinetuneConfig:
    """Build the settings of the run, with the defaults that depend on other options."""
    from gpt2jax.data.token_cache import default_cache

    given = vars(options.train)
    if given["steps"] is None and options.source.data == "numeric-docs" and given["epochs"] == 1:
        given = {**given, "steps": DEFAULT_JOB_STEPS}
    folder = default_cache() if options.cache_tokens else None
    defaults: dict[str, Any] = {
        "packing": options.packing or ("padded" if _iterate(options, "all").is_papers() else "concat"),
        "lora": options.lora_settings.config() if options.lora else None,
        "token_cache": None if folder is None else str(folder),
    }
    return FinetuneConfig(**{**given, **defaults})


def default_output(options: Options) -> pathlib.Path:
    """Return runs/MODEL-DATA, from the last parts of the two names."""
    parts = [
        pathlib.PurePath(name).name.split(".")[0] or "model" for name in (options.model, options.source.data)
    ]
    return pathlib.Path("runs") / "-".join(parts)


def starting_model(options: Options) -> Any:
    """Load the model that training begins with, or make one with random parameters."""
    from gpt2jax.language_model import from_config
    from gpt2jax.model.config import PRESETS
    from gpt2jax.tokenizer.bpe import Tokenizer

    if options.init == "pretrained":
        return options.text.load(options.model)
    if options.model not in PRESETS:
        known = ", ".join(PRESETS)
        raise ValueError(f"--model must be one of {known} with --init random, got {options.model!r}")
    shape = PRESETS[options.model]
    tokenizer = Tokenizer.gpt2(shape.vocab_size).with_special_tokens(options.text.special_tokens)
    return from_config(shape, options.train.seed, tokenizer=tokenizer)
