"""`gpt2jax finetune`: train, evaluate before and after on held-out texts, generate with both, write a report."""

from __future__ import annotations

import dataclasses
import pathlib
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from gpt2jax.cli.common import (
    LORA_RANK,
    LORA_TARGETS,
    DataOptions,
    check_folder,
    command_line,
    run_command,
    say,
)
from gpt2jax.cli.processes import ProcessOptions
from gpt2jax.train.config import FinetuneConfig

# an optimizer step of the default job takes about two seconds on two cores: it is to end within three minutes
DEFAULT_JOB_STEPS = 40
STUDY_DATA = ("pubmed", "arxiv")

_TYPES = typing.get_type_hints(FinetuneConfig)
# the settings of a run as options of the command; LoRA's are options of their own below
TrainOptions: Any = dataclasses.make_dataclass(
    "TrainOptions",
    [
        (field.name, _TYPES[field.name], dataclasses.field(default=field.default))
        for field in dataclasses.fields(FinetuneConfig)
        if field.name not in ("lora", "layout", "steps", "token_cache")
    ],
    frozen=True,
    namespace={"__doc__": FinetuneConfig.__doc__},
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Fine-tune a model on texts and show what it gained.

    Without options: the packaged gpt2-mini, specialised on the documentation of the installed numerical packages.

    Attributes:
        model: gpt2-mini, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a hub id, or a path.
        init: "random" trains a model of that name's shape from scratch.
        source: of the texts.
        train_split: what is trained on, with the syntax of the datasets library: train, "train[:50%]", train+test.
        validation_split: what is evaluated during the training.
        eval_split: what the comparison is made on.
        out: folder for metrics, checkpoints, the model and the report. Default: runs/MODEL-DATA.
        resume: go on where a killed or interrupted run in that folder stopped.
        overwrite: delete the run that the folder holds.
        steps: optimizer steps. Default: 40 for numeric-docs, else as many as make --epochs.
        layout: "windows" trains on every token; "packed" too, with several texts in a row kept apart; "documents" on
            the first tokens of each text, as the study did. Default: "documents" for pubmed and arxiv, else "windows".
        prompt_column: column whose texts are context only, with --completion-column.
        completion_column: column whose texts are learned.
        cache_tokens: keep the tokenized texts for later runs, in $GPT2JAX_CACHE or the user's cache folder.
        lora: train low-rank adapters instead of all parameters.
        lora_rank: their rank.
        lora_alpha: their output is scaled by alpha / rank. Default: what makes that 1.
        lora_dropout: dropout of their input.
        lora_targets: linears that get one: attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj, or attn.q, attn.k, attn.v;
            "*" stands for any characters.
        lora_scaling: "rslora" scales by alpha / sqrt(rank) instead.
        dora: learn the length of each column of the weights too (DoRA).
        lora_ranks: other ranks for some linears, as PATTERN=RANK: h.11.attn.c_attn=16.
        train: settings of the run.
        several: processes that train together.
        compare: evaluate the model before and after and write the report.
        eval_documents: at most so many held-out documents, for the validation and for the comparison each.
        prompts: prompts for the generated texts. Default: a set that suits the data.
        max_new_tokens: length of the generated texts.
    """

    model: str = "gpt2-mini"
    init: Literal["pretrained", "random"] = "pretrained"
    source: DataOptions = dataclasses.field(default_factory=DataOptions)
    train_split: str = "train"
    validation_split: str = "validation"
    eval_split: str = "test"
    out: pathlib.Path | None = None
    resume: bool = False
    overwrite: bool = False
    steps: int | None = None
    layout: Literal["windows", "packed", "documents"] | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    cache_tokens: bool = True
    lora: bool = False
    lora_rank: int = LORA_RANK
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = LORA_TARGETS
    lora_scaling: Literal["lora", "rslora"] = "lora"
    dora: bool = False
    lora_ranks: tuple[str, ...] = ()
    train: TrainOptions = dataclasses.field(default_factory=TrainOptions)  # pyright: ignore[reportInvalidTypeForm]
    several: ProcessOptions = dataclasses.field(default_factory=ProcessOptions)
    compare: bool = True
    eval_documents: int = 120
    prompts: tuple[str, ...] | None = None
    max_new_tokens: int = 100


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    run_command("finetune", Options, run, argv)


def run(options: Options) -> None:
    """Loads, trains, compares, writes, and says where."""
    import jax
    from rich.console import Console

    from gpt2jax.generation.config import GenerationConfig
    from gpt2jax.generation.requests import check_prompts
    from gpt2jax.train.loop import finetune
    from gpt2jax.train.run_folder import RunFolder

    _check(options)
    options.several.join()
    console = Console(quiet=jax.process_index() > 0)
    options = dataclasses.replace(options, source=options.source.pinned())
    config = finetune_config(options)
    output = options.out or default_output(options)
    # refuse before anything long begins
    RunFolder(output, resume=options.resume, overwrite=options.overwrite)
    check_folder(output)
    train_texts = _texts(options, options.train_split, limit=options.source.limit)
    validation_texts = _texts(options, options.validation_split, limit=options.eval_documents)
    test_texts = _texts(options, options.eval_split, limit=options.eval_documents) if options.compare else []
    count = f"{len(train_texts):,} documents" if isinstance(train_texts, list) else "documents as they come"
    say(
        console,
        "texts",
        f"{options.source.data}: {count} to train on, {len(validation_texts):,} for validation, "
        f"{len(test_texts):,} held out for the comparison",
    )
    model = starting_model(options)
    say(console, "model", repr(model))
    if options.compare:  # what can't be generated is to be known before the training
        check_prompts(model, _prompts(options), GenerationConfig(max_new_tokens=options.max_new_tokens))
    if config.base_dtype is not None:  # what trains is a copy, and the device may have no room for both
        model = model.merge_adapter()
        model = dataclasses.replace(model, params=jax.device_get(model.params))
    result = finetune(
        model,
        train_texts,
        config,
        validation_texts=validation_texts,
        output=output,
        resume=options.resume,
        overwrite=options.overwrite,
        source=options.source.origin(options.train_split),
    )
    if options.compare:
        if config.base_dtype is not None:
            model = dataclasses.replace(model, params=jax.device_put(model.params))
            trained = dataclasses.replace(result.model, params=model.params)
            result = dataclasses.replace(result, model=trained)
        _compare(options, model, result, _plain(test_texts), _plain(train_texts), console)
    files = "report.html, report.md, comparison.json, " if options.compare else ""
    result_folder = "adapter" if options.lora else "model"
    say(console, "wrote", f"{output}: {files}{result_folder}, checkpoints, metrics.jsonl")


def _check(options: Options) -> None:
    """Raises ValueError for options that would have no effect, or make no sense."""
    fields = dataclasses.fields(options)
    given = [field.name for field in fields if getattr(options, field.name) != field.default]
    of_lora = [name for name in given if name == "dora" or name.startswith("lora_")]
    if of_lora and not options.lora:
        names = ", ".join("--" + name.replace("_", "-") for name in of_lora)
        raise ValueError(f"{names} is for adapters: give --lora as well")
    if options.eval_documents < 1:
        raise ValueError(f"--eval-documents {options.eval_documents} must be at least 1")


def _prompts(options: Options) -> Sequence[str]:
    return options.prompts or default_prompts(options.source.data)


def _compare(
    options: Options, model: Any, result: Any, texts: Any, training_texts: Any, console: Any
) -> None:
    from gpt2jax.comparison.compare import compare
    from gpt2jax.report.summary import print_comparison

    length = options.train.sequence_length or min(model.config.n_positions, 1024)
    comparison = compare(
        {"generic": model, "specialised": result.model},
        texts,
        prompts=_prompts(options),
        sequence_length=length,
        training_texts=training_texts,
        max_new_tokens=options.max_new_tokens,
        seed=options.train.seed,
        history=result.history,
        command=command_line("finetune"),
        source=options.source.origin(options.eval_split),
    )
    if not console.quiet:  # of several processes all compute it, so that none waits for another one
        comparison.save(result.output)
    print_comparison(comparison, console)


def _texts(options: Options, split: str, *, limit: int | None) -> Any:
    """Return texts, or prompts with completions: a list, or a stream for --streaming where it is trained on."""
    texts = options.source.iterate(
        split,
        limit=limit,
        prompt_column=options.prompt_column,
        completion_column=options.completion_column,
    )
    return texts if options.source.streaming and split == options.train_split else list(texts)


def _plain(texts: Iterable[Any]) -> Iterable[Any]:
    """Return prompts with completions as single texts."""
    plain = (text["prompt"] + text["completion"] if isinstance(text, dict) else text for text in texts)
    return list(plain) if isinstance(texts, list) else plain


def _rank(text: str) -> tuple[str, int]:
    pattern, _, rank = text.rpartition("=")
    if not pattern or not rank.isdecimal():
        raise ValueError(f"--lora-ranks {text!r} must be PATTERN=RANK, as in h.11.attn.c_attn=16")
    return pattern, int(rank)


def finetune_config(options: Options) -> FinetuneConfig:
    """The settings of the run, defaults that depend on the data filled in."""
    from gpt2jax.data.token_cache import default_cache
    from gpt2jax.lora.config import LoRAConfig

    lora = None
    if options.lora:
        use_rslora = options.lora_scaling == "rslora"
        scale_one = options.lora_rank**0.5 if use_rslora else float(options.lora_rank)
        lora = LoRAConfig(
            options.lora_rank,
            scale_one if options.lora_alpha is None else options.lora_alpha,
            options.lora_dropout,
            options.lora_targets,
            use_rslora=use_rslora,
            use_dora=options.dora,
            rank_pattern=tuple(_rank(text) for text in options.lora_ranks),
        )
    steps = options.steps
    if (
        steps is None
        and options.source.data == "numeric-docs"
        and options.train.epochs == TrainOptions().epochs
    ):
        steps = DEFAULT_JOB_STEPS
    layout = options.layout or ("documents" if options.source.data in STUDY_DATA else "windows")
    folder = default_cache() if options.cache_tokens else None
    cache = None if folder is None else str(folder)
    settings = dataclasses.asdict(options.train)
    return FinetuneConfig(**settings, steps=steps, layout=layout, lora=lora, token_cache=cache)


def default_output(options: Options) -> pathlib.Path:
    """runs/MODEL-DATA, from the last parts of the two names."""
    parts = [
        pathlib.PurePath(name).name.split(".")[0] or "model" for name in (options.model, options.source.data)
    ]
    return pathlib.Path("runs") / "-".join(parts)


def starting_model(options: Options) -> Any:
    """The model that training begins with."""
    from gpt2jax.language_model import from_config
    from gpt2jax.loading import load
    from gpt2jax.model.config import PRESETS
    from gpt2jax.tokenizer.bpe import Tokenizer

    if options.init == "pretrained":
        return load(options.model)
    if options.model not in PRESETS:
        raise ValueError(
            f"--init random needs the name of a shape: {', '.join(PRESETS)}; not {options.model!r}"
        )
    shape = PRESETS[options.model]
    return from_config(shape, options.train.seed, tokenizer=Tokenizer.gpt2(shape.vocab_size))


def default_prompts(data: str) -> tuple[str, ...]:
    """Prompts of the kind of text that the data holds."""
    from gpt2jax.comparison.compare import DEFAULT_PROMPTS

    if data in ("numeric-docs", "python-docs"):
        return DOCUMENTATION_PROMPTS
    return DEFAULT_PROMPTS


DOCUMENTATION_PROMPTS = (
    "jax.numpy.mean(a, axis=None)\n\n",
    "numpy.linalg.solve(a, b)\n\nSolve",
    "Returns the",
    "Parameters\n----------\n",
    "This function",
    "",
)
