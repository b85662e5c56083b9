"""Fine-tuning: from a model and texts to a trained model, its history and a run folder that can be resumed.

A run folder holds `run.json` (settings), `metrics.jsonl`, `checkpoints/`, and at the end `model/` (all parameters) or
`adapter/` (LoRA).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt2jax.data.batches import Batches, check_long_enough
from gpt2jax.data.documents import Documents
from gpt2jax.data.tokenization import tokenize_documents
from gpt2jax.language_model import LanguageModel
from gpt2jax.lora.adapters import cast_base, init_adapters
from gpt2jax.lora.config import check_patterns
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params
from gpt2jax.ops.precision import Precision
from gpt2jax.sharding import barrier, gather, make_mesh, num_batch_shards, shard, use_mesh
from gpt2jax.train.checkpoint import BestCheckpoint, Checkpoints
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.freezing import merge_params, partition_params
from gpt2jax.train.log import NonFiniteError, TrainLog
from gpt2jax.train.optimizer import make_optimizer
from gpt2jax.train.run_folder import RunFolder
from gpt2jax.train.schedules import resolve_learning_rate
from gpt2jax.train.step import TrainState, init_state, make_configured_step
from gpt2jax.train.stopping import StopController, stopped
from gpt2jax.train.trackers import check_trackers, close_trackers, open_trackers
from gpt2jax.train.unrolled import should_unroll, stack_layers, unstack_layers
from gpt2jax.train.validation import place, validation_loss
from gpt2jax.utils.progress import training_progress
from gpt2jax.utils.validation import check_model, check_texts
from gpt2jax.weights.orbax import eval_params


@dataclasses.dataclass(frozen=True)
class Run:
    """What a fine-tuning gives.

    Attributes:
        model: the trained model; with LoRA the given model and its adapters, its parameters as they were given
            whatever `base_dtype` the adapters were trained on.
        history: one dict a logged step: step, loss (mean per token since the last entry, nats), accuracy, tokens
            (since the beginning), learning_rate, grad_norm, tokens_per_second, seconds; validation_loss and
            validation_accuracy where there was a validation; loss_scale and skipped with float16.
        output: the run folder, or None.
    """

    model: LanguageModel
    history: list[dict[str, float]]
    output: pathlib.Path | None


def finetune(
    model: LanguageModel,
    train_texts: Iterable[Any],
    config: FinetuneConfig | None = None,
    *,
    validation_texts: Iterable[Any] | None = None,
    output: str | pathlib.Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    source: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Run:
    """Fine-tunes a model on texts.

    Args:
        model: where to start; it is not changed.
        train_texts: list of str, list of token-id lists, a `datasets.Dataset` column, or any iterable of these; or of
            {"prompt": ..., "completion": ...}, of which only the completions are learned.
        config: settings.
        validation_texts: held-out texts; their loss is logged along the way.
        output: run folder for metrics, checkpoints and the result; None writes nothing.
        resume: go on from the newest checkpoint in `output` (from the start where there is none). On the same device
            count it ends with the same parameters, bit for bit, as a run that was never stopped.
        overwrite: start anew in a folder that holds another run, which is deleted.
        source: where the texts come from, for `run.json`.
        progress: show a progress bar (a line per logged step where there is no terminal); of several processes the
            first one does.

    Raises:
        ValueError: impossible settings, no trainable text, a resumed run with other settings or texts, or both `resume`
            and `overwrite`.
        TypeError: the texts are one string, or no list.
        FileExistsError: `output` holds another run and neither `resume` nor `overwrite` is given, or
            one that is going on.
        FloatingPointError: the loss is not finite any more; names the step, the documents of its batch and the last
            good checkpoint.
        ModuleNotFoundError: `config.track` names what is not installed.
        KeyboardInterrupt: Ctrl-C or SIGTERM, when the step is done and a checkpoint written; says how to go on.
    """
    check_model("model", model)
    check_texts("train_texts", train_texts)
    if validation_texts is not None:
        check_texts("validation_texts", validation_texts)
    if source is not None and not isinstance(source, Mapping):
        raise ValueError(f"source={source!r:.60} must be a dict, or None")
    if config is not None and not isinstance(config, FinetuneConfig):
        raise ValueError(f"config={config!r:.60} must be a FinetuneConfig, or None")
    config = resolve_learning_rate(config or FinetuneConfig(), model.num_parameters())
    if model.adapters is not None:
        model = model.merge_adapter()
    check_trackers(config, output)
    _check_names(model, config)
    progress = progress and jax.process_index() == 0
    if validation_texts is None and (config.keep_best or config.patience is not None):
        raise ValueError("keep_best and patience go by the validation loss; give validation_texts")
    tokenize = functools.partial(
        tokenize_documents,
        tokenizer=model.tokenizer,
        vocab_size=model.config.vocab_size,
        cache=config.token_cache,
        progress=progress,
    )
    documents = tokenize(train_texts)
    validation = None
    if validation_texts is not None:
        validation = tokenize(validation_texts)
        check_long_enough(validation, "validation texts")
    plan = _plan(model, config, documents)
    folder = None
    with contextlib.ExitStack() as stack:
        if output is not None:
            folder = RunFolder(output, resume=resume, overwrite=overwrite)
            stack.enter_context(folder.alone())
            folder.begin(model, config, documents, source)
            barrier("the run folder")
        return _train(model, config, plan, validation, folder, show=progress)


def _check_names(model: LanguageModel, config: FinetuneConfig) -> None:
    """Refuses names of parameters that are none, before anything is written."""
    if config.freeze:
        partition_params(model.params, config.freeze)
    if config.lora is not None:
        check_patterns(config.lora, model.config.n_layer)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What follows from settings, data and devices: batches, number of steps, and when to do what."""

    mesh: Mesh | None
    batches: Batches
    steps: int
    eval_every: int
    checkpoint_every: int


def _plan(model: LanguageModel, config: FinetuneConfig, documents: Documents) -> _Plan:
    context = model.config.n_positions
    length = config.sequence_length or min(context, 1024)
    if length > context:
        raise ValueError(f"sequence_length={length} is over the model's context of {context} tokens")
    end = model.end_token_id
    batches = Batches(documents, config.layout, length, config.batch_size, end, config.seed)
    steps = config.steps or max(1, math.ceil(config.epochs * batches.rows / config.batch_size))
    third = max(1, math.ceil(steps / 3))
    return _Plan(_mesh(config), batches, steps, config.eval_every or third, config.checkpoint_every or third)


def _mesh(config: FinetuneConfig) -> Mesh | None:
    """All devices as the settings cut them; None for a single one."""
    if jax.device_count() == config.fsdp == config.tensor_parallel == 1:
        return None
    mesh = make_mesh(fsdp=config.fsdp, tensor=config.tensor_parallel)
    rows, ways = config.batch_size // config.accumulation, num_batch_shards(mesh)
    if rows % ways:
        parts = "" if config.accumulation == 1 else f" / accumulation={config.accumulation}"
        raise ValueError(f"batch_size={config.batch_size}{parts} can't be divided among {ways} devices")
    return mesh


def _train(
    model: LanguageModel,
    config: FinetuneConfig,
    plan: _Plan,
    validation: Documents | None,
    folder: RunFolder | None,
    *,
    show: bool,
) -> Run:
    optimizer = make_optimizer(config, plan.steps)
    checkpoints = None
    if folder is not None:
        checkpoints = Checkpoints(folder.checkpoints, keep=config.keep_checkpoints, run=folder.description)
    state, frozen, mask, unlogged = _starting_point(model, config, plan, optimizer, checkpoints)
    step_function = make_configured_step(
        with_dropout(model.config, config.dropout),
        config,
        optimizer,
        Precision.for_backend(config.compute_dtype),
        mask=mask,
    )
    best = None
    if config.keep_best or config.patience is not None:
        best = BestCheckpoint(None if folder is None else folder.best)
    start = int(state["step"])
    validate = None
    if validation is not None:
        validate = functools.partial(
            validation_loss,
            model=model,
            config=config,
            documents=validation,
            length=plan.batches.sequence_length,
            frozen=frozen,
            mesh=plan.mesh,
        )
    with contextlib.ExitStack() as stack:
        trackers = open_trackers(config, folder, start)
        stack.callback(close_trackers, trackers)
        log = TrainLog(config, plan.steps, folder, start, unlogged, [tracker.write for tracker in trackers])
        limits = stack.enter_context(StopController(config, log.history))
        for resource in (best, checkpoints):
            if resource is not None:
                stack.callback(resource.close)
        report = stack.enter_context(training_progress(plan.steps, start, show=show))
        stack.enter_context(use_mesh(plan.mesh))
        try:
            for step in range(start, plan.steps + 1):
                if step > start:
                    batch = place(plan.batches.batch(step - 1), plan.mesh)
                    state, metrics = step_function(state, frozen, batch)
                    # fetching the metrics of the step before keeps the device busy with this one
                    log.add(step, metrics)
                elif limits.patience_is_over():  # the resumed run had ended
                    break
                elif not log.unlogged:  # else the run stopped between a step and its entry in the log
                    continue
                limits.agree(step)
                at_end = step == plan.steps or limits.time_is_over()
                extra = {}
                if validate is not None and (step % plan.eval_every == 0 or at_end):
                    log.pause()
                    extra = validate(eval_params(state))
                    if best is not None and limits.is_best(extra["validation_loss"]):
                        best.save(step, stack_layers(eval_params(state)))
                if extra or at_end or step % config.log_every == 0:
                    report(step, log.flush(extra))
                at_end = at_end or limits.patience_is_over()
                if checkpoints is not None and (step % plan.checkpoint_every == 0 or at_end):
                    log.fetch()
                    checkpoints.save(step, stack_layers(state), log.unlogged)
                limits.stop_if_asked()
                if at_end:
                    break
        except KeyboardInterrupt as interrupt:
            # between a step and its log there is no whole state: then the checkpoint before has to do
            if checkpoints is not None and log.step > start and not state["step"].is_deleted():
                log.fetch()
                if log.step == int(state["step"]):
                    checkpoints.save(log.step, stack_layers(state), log.unlogged)
            raise stopped(interrupt, checkpoints, folder) from None
        except NonFiniteError as error:
            if log.unlogged:  # with the way there
                log.flush({})
            raise _explained(error, plan, checkpoints, folder) from None
    result = stack_layers(eval_params(state))
    if best is not None:
        result = best.restore(result)
    trained = _trained_model(model, config, result, frozen, plan.mesh)
    if folder is not None:
        folder.finish(trained)
    return Run(trained, log.history, None if folder is None else folder.path)


def _explained(
    error: NonFiniteError, plan: _Plan, checkpoints: Checkpoints | None, folder: RunFolder | None
) -> FloatingPointError:
    """The error with the documents of its batch and the last good checkpoint."""
    good = None if checkpoints is None else checkpoints.good_step(error.first)
    where = "there is no checkpoint from before"
    if folder is not None and good is not None:
        where = f"the last good checkpoint is step {good}, a model at {folder.checkpoints / str(good)}"
    ids = plan.batches.documents_of(error.step - 1)
    shown = ", ".join(map(str, ids[:20])) + (", ..." if len(ids) > 20 else "")
    return FloatingPointError(
        f"{error}; its batch, number {error.step - 1}, holds documents {shown}; {where}"
    )


def with_dropout(config: GPT2Config, rate: float | None) -> GPT2Config:
    """The configuration with all three dropout rates set to `rate`, or as it is for None."""
    if rate is None:
        return config
    return dataclasses.replace(config, embd_pdrop=rate, attn_pdrop=rate, resid_pdrop=rate)


def _starting_point(
    model: LanguageModel, config: FinetuneConfig, plan: _Plan, optimizer: Any, checkpoints: Checkpoints | None
) -> tuple[TrainState, Params | None, Params | None, list[dict[str, float]]]:
    """(state, what is frozen, mask, unlogged metrics): of a new run, or as the newest checkpoint has them."""
    trainable, frozen, mask = _parts(model, config)
    state, unlogged = _fresh_state(trainable, config, optimizer), []
    if plan.mesh is not None:
        state, frozen = shard(state, plan.mesh), None if frozen is None else shard(frozen, plan.mesh)
    if checkpoints is not None and checkpoints.latest_step() is not None:
        state, unlogged = checkpoints.restore(state)
    length, devices = plan.batches.sequence_length, jax.device_count()
    if should_unroll(model.config, config, length, jax.default_backend(), devices):
        state = unstack_layers(state)
    return state, frozen, mask, unlogged


def _parts(model: LanguageModel, config: FinetuneConfig) -> tuple[Params, Params | None, Params | None]:
    """(trained parameters or adapters, what is frozen, mask of the former), as the training step takes them."""
    if config.lora is not None:
        base = cast_base(model.params, config.base_dtype)
        return init_adapters(model.config, config.lora, config.seed, params=base), base, None
    if not config.freeze:
        trained, frozen, mask = model.params, None, None
    else:
        trained, frozen, mask = partition_params(model.params, config.freeze)
    # the step donates its state; the model stays as it is, and training is in float32 wherever it was loaded in
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), trained), frozen or None, mask


def _fresh_state(trainable: Params, config: FinetuneConfig, optimizer: Any) -> TrainState:
    scaling, ema = config.compute_dtype == "float16", config.ema_decay is not None
    state = init_state(trainable, optimizer, loss_scaling=scaling, ema=ema)
    # bound to its device, as a restored one is: both take the very same compiled step
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, state))


def _trained_model(
    model: LanguageModel, config: FinetuneConfig, result: Params, frozen: Params | None, mesh: Mesh | None
) -> LanguageModel:
    if config.lora is not None:
        return dataclasses.replace(model, adapters=_whole(result, mesh), lora=config.lora)
    params = merge_params(result, frozen)
    # the order of the leaves is part of a file's bytes
    ordered = jax.tree.unflatten(jax.tree.structure(model.params), jax.tree.leaves(params))
    return dataclasses.replace(model, params=_whole(ordered, mesh), source=None)


def _whole(tree: Params, mesh: Mesh | None) -> Params:
    """The whole arrays, bound to no device, as a loaded model has them: both then take the same compiled programs."""
    tree = tree if mesh is None else gather(tree)
    return jax.tree.map(lambda leaf: jnp.array(jax.device_get(leaf)), tree)
