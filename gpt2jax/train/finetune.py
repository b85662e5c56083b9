"""Fine-tuning: from a model and texts to a trained model, its history and a run folder that can be resumed.

A run folder holds `run.json` (settings), `metrics.jsonl`, `checkpoints/`, and at the end `model/` (all parameters) or
`adapter/` (LoRA).
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from gpt2jax.data.batches import check_labels
from gpt2jax.data.documents import Documents
from gpt2jax.data.tokenization import tokenize_documents
from gpt2jax.language_model import LanguageModel
from gpt2jax.lora.config import check_patterns
from gpt2jax.sharding import barrier
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.freezing import partition_params
from gpt2jax.train.optimizer import resolve_learning_rate
from gpt2jax.train.run_folder import RunFolder
from gpt2jax.train.stopping import Interrupted
from gpt2jax.train.trackers import check_trackers
from gpt2jax.train.trainer import Run, RunPlan, Trainer, plan_run
from gpt2jax.utils.jax_switches import default_switches
from gpt2jax.utils.notices import notice, wrap_lines
from gpt2jax.utils.validation import (
    check,
    check_model,
    check_names,
    check_texts,
    field_names,
    instance_of,
    optional,
    override_fields,
)

# the arguments of `finetune` that are not settings: a wrong name may be meant as one of them
_ARGUMENTS = (
    "train_texts",
    "config",
    "validation_texts",
    "output",
    "resume",
    "overwrite",
    "source",
    "progress",
)


@default_switches()
def finetune(
    model: LanguageModel,
    train_texts: Iterable[Any],
    config: FinetuneConfig | None = None,
    *,
    validation_texts: Iterable[Any] | None = None,
    output: str | pathlib.Path | RunFolder | None = None,
    resume: bool = False,
    overwrite: bool = False,
    source: Mapping[str, Any] | None = None,
    progress: bool = True,
    **overrides: Any,
) -> Run:
    """Fine-tune a model on texts.

    Args:
        model: where to start; it is not changed. Adapters that it has are merged first.
        train_texts: list of str or of token-id lists, a `datasets.Dataset` column, or any iterable of these; or of
            {"prompt": ..., "completion": ...}, of which only the completions are learned.
        config: settings.
        validation_texts: held-out texts; their loss is logged along the way.
        output: run folder for metrics, checkpoints and the result; None writes nothing. A `RunFolder` says itself
            whether to resume or to overwrite.
        resume: go on from the newest checkpoint in `output` (from the start if it has none). On the same number of
            devices the run ends with the same parameters, bit for bit, as one that was never stopped. `steps` and
            `epochs` may differ if the steps that are done have the same learning rates in a run of the new length.
        overwrite: start anew in a folder that holds another run, which is deleted.
        source: where the texts come from, for `run.json`.
        progress: show a progress bar (a line per logged step if standard error is not a terminal); of several
            processes the first one does.
        **overrides: fields of `FinetuneConfig`, such as `epochs=3`; they win over `config`.

    Raises:
        ValueError: impossible settings, no trainable text, a resumed run with other settings or texts, or both `resume`
            and `overwrite`.
        TypeError: the texts are one string, or not a list; or an unknown setting.
        FileExistsError: `output` holds another run and neither `resume` nor `overwrite` is given, or a run goes on in
            it now.
        FloatingPointError: the loss is not finite any more; names the step, the documents of its batch and the last
            good checkpoint. Or every step was skipped, which only float16 does.
        ModuleNotFoundError: `config.trackers` names what is not installed.
        KeyboardInterrupt: Ctrl-C or SIGTERM, when the step is done and a checkpoint written; says how to go on. Without
            `output` its attribute `run` is the `Run` so far.
    """
    check_names("setting", overrides, [*field_names(FinetuneConfig), *_ARGUMENTS])
    _check_arguments(model, train_texts, validation_texts, source)
    config = override_fields("config", FinetuneConfig, config, overrides)
    config = resolve_learning_rate(config, model.num_parameters())
    model = _merge_adapters(model, config)
    _check_config(config, model, output, has_validation=validation_texts is not None)
    progress = progress and jax.process_index() == 0
    documents, validation = _tokenize(model, config, train_texts, validation_texts, progress=progress)
    plan = _plan(model, config, documents, validation)
    if progress:
        print(wrap_lines(f"training: {plan.describe(config)}", sys.stderr), file=sys.stderr)
    folder = _run_folder(output, resume=resume, overwrite=overwrite)
    with contextlib.ExitStack() as stack:
        if folder is not None:
            stack.enter_context(folder.lock())
            count_steps = functools.partial(_count_steps, model, documents=documents)
            folder.begin(model, config, documents, source, count_steps=count_steps)
            barrier("the run folder")
        trainer = Trainer(model, config, plan, validation, folder, show_progress=progress)
        _train(trainer, folder)
        return trainer.finish()


def _check_arguments(
    model: LanguageModel,
    train_texts: Iterable[Any],
    validation_texts: Iterable[Any] | None,
    source: Mapping[str, Any] | None,
) -> None:
    check_model("model", model)
    check_texts("train_texts", train_texts)
    if validation_texts is not None:
        check_texts("validation_texts", validation_texts)
    check("source", source, optional(instance_of(Mapping)))


def _plan(
    model: LanguageModel, config: FinetuneConfig, documents: Documents, validation: Documents | None
) -> RunPlan:
    plan = plan_run(model, config, documents)
    if validation is not None:
        check_labels(validation, config.packing, plan.batches.sequence_length, "validation texts")
    return plan


def _train(trainer: Trainer, folder: RunFolder | None) -> None:
    """Train; an interrupted run without a folder is handed over in the exception."""
    try:
        with trainer:
            trainer.train()
    except Interrupted as interrupt:
        if folder is None and not trainer.state["step"].is_deleted():
            interrupt.run = trainer.finish()
        raise


def _merge_adapters(model: LanguageModel, config: FinetuneConfig) -> LanguageModel:
    """Return the model that a run begins with; say what becomes of the adapters that it has."""
    if model.adapters is None:
        return model
    trained = "all parameters" if config.lora is None else "new adapters"
    notice(f"the model's adapters are merged into its weights first; this run trains {trained}")
    return model.merge_adapter()


def _count_steps(model: LanguageModel, config: FinetuneConfig, documents: Documents) -> int:
    return plan_run(model, config, documents).steps


def _tokenize(
    model: LanguageModel,
    config: FinetuneConfig,
    train_texts: Iterable[Any],
    validation_texts: Iterable[Any] | None,
    *,
    progress: bool,
) -> tuple[Documents, Documents | None]:
    tokenize = functools.partial(
        tokenize_documents,
        tokenizer=model.tokenizer,
        vocab_size=model.config.vocab_size,
        cache=config.token_cache,
        progress=progress,
    )
    documents = tokenize(train_texts)
    if validation_texts is None:
        return documents, None
    return documents, tokenize(validation_texts)


def _run_folder(output: Any, *, resume: bool, overwrite: bool) -> RunFolder | None:
    if isinstance(output, RunFolder) and (resume or overwrite):
        raise ValueError("resume and overwrite must be given to the RunFolder, got output=RunFolder(...)")
    if output is None or isinstance(output, RunFolder):
        return output
    return RunFolder(output, resume=resume, overwrite=overwrite)


def _check_config(config: FinetuneConfig, model: LanguageModel, output: Any, *, has_validation: bool) -> None:
    """Check what the settings need from the other arguments, before anything is written."""
    check_trackers(config, output)
    if config.freeze:
        partition_params(model.params, config.freeze)
    if config.lora is not None:
        check_patterns(config.lora, model.config.n_layer)
    if not has_validation and (config.keep_best or config.patience is not None):
        raise ValueError("keep_best and patience need a validation loss; give validation_texts")
