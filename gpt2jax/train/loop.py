"""Fine-tuning: from a model and texts to a trained model, its history and a run folder that can be resumed.

A run folder holds `run.json` (settings), `metrics.jsonl`, `checkpoints/`, and at the end `model/` (all parameters) or
`adapter/` (LoRA).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gpt2jax.config import GPT2Config
from gpt2jax.data.batches import Batch, Batches, check_long_enough, sequential_batches
from gpt2jax.data.documents import Documents, tokenize_documents
from gpt2jax.distributed import batch_ways, gather, make_mesh, on_mesh, shard, shard_batch
from gpt2jax.language_model import LanguageModel
from gpt2jax.lora import init_adapters
from gpt2jax.losses import token_losses
from gpt2jax.model import head_kernel, hidden_states
from gpt2jax.precision import precision
from gpt2jax.train.checkpoint import Checkpoints
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.optimizer import make_optimizer
from gpt2jax.train.progress import training_progress
from gpt2jax.train.run_folder import RunFolder
from gpt2jax.train.schedules import make_schedule, resolve_learning_rate
from gpt2jax.train.step import MIN_SCALE, TrainState, init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Run:
    """What a fine-tuning gives.

    Attributes:
        model: the trained model; with LoRA the given model and its adapters.
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
    progress: bool = True,
) -> Run:
    """Fine-tunes a model on texts.

    Args:
        model: where to start; it is not changed.
        train_texts: list of str, list of token-id lists, or a `datasets.Dataset` column.
        config: settings.
        validation_texts: held-out texts; their loss is logged along the way.
        output: run folder for metrics, checkpoints and the result; None writes nothing.
        resume: go on from the newest checkpoint in `output` (from the start where there is none). On the same device
            count it ends with the same parameters, bit for bit, as a run that was never stopped.
        overwrite: start anew in a folder that holds another run, which is deleted.
        progress: show a progress bar (a line per logged step where there is no terminal).

    Raises:
        ValueError: impossible settings, no trainable text, or a resumed run with other settings or texts.
        FileExistsError: `output` holds another run and neither `resume` nor `overwrite` is given.
        FloatingPointError: the loss is not finite any more; names the step and the last good checkpoint.
    """
    config = resolve_learning_rate(config or FinetuneConfig(), model.num_parameters())
    if model.adapters is not None:
        model = model.merge_adapter()
    documents = tokenize_documents(train_texts, model.tokenizer, vocab_size=model.config.vocab_size)
    validation = None
    if validation_texts is not None:
        validation = tokenize_documents(validation_texts, model.tokenizer, vocab_size=model.config.vocab_size)
        check_long_enough(validation)
    plan = _plan(model, config, documents)
    folder = None
    if output is not None:
        folder = RunFolder(output, resume=resume, overwrite=overwrite)
        folder.begin(model, config, documents)
    return _train(model, config, plan, validation, folder, show=progress)


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
    rows, ways = config.batch_size // config.accumulation, batch_ways(mesh)
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
    architecture = with_dropout(model.config, config.dropout)
    numerics = precision(config.compute_dtype)
    optimizer = make_optimizer(config, plan.steps)
    step_function = make_train_step(
        architecture,
        optimizer,
        numerics,
        lora=config.lora,
        max_grad_norm=config.max_grad_norm,
        accumulation=config.accumulation,
        seed=config.seed,
    )
    frozen = None if config.lora is None else model.params
    state = _fresh_state(model, config, optimizer)
    if plan.mesh is not None:
        state, frozen = shard(state, plan.mesh), None if frozen is None else shard(frozen, plan.mesh)
    checkpoints, unlogged = None, []
    if folder is not None:
        checkpoints = Checkpoints(folder.checkpoints, keep=config.keep_checkpoints)
        if checkpoints.latest_step() is not None:
            state, unlogged = checkpoints.restore(state)
    start = int(state["step"])
    log = _Log(config, plan, folder, start, unlogged)
    validate = None
    if validation is not None:
        validate = functools.partial(
            validation_loss,
            model=model if frozen is None else dataclasses.replace(model, params=frozen),
            config=config,
            documents=validation,
            length=plan.batches.sequence_length,
            mesh=plan.mesh,
        )
    try:
        with on_mesh(plan.mesh), training_progress(plan.steps, start, show=show) as report:
            for step in range(start, plan.steps + 1):
                if step > start:
                    state, metrics = step_function(
                        state, frozen, _place(plan.batches.batch(step - 1), plan.mesh)
                    )
                    # fetching the metrics of the step before keeps the device busy with this one
                    log.add(step, metrics)
                elif not log.unlogged:  # else the run stopped between a step and its entry in the log
                    continue
                at_end = step == plan.steps
                extra = {}
                if validate is not None and (step % plan.eval_every == 0 or at_end):
                    log.pause()
                    extra = validate(state["params"])
                if extra or at_end or step % config.log_every == 0:
                    report(step, log.flush(extra))
                if checkpoints is not None and (step % plan.checkpoint_every == 0 or at_end):
                    log.fetch()
                    checkpoints.save(step, state, log.unlogged)
    except KeyboardInterrupt:
        # between a step and its log there is no whole state: then the checkpoint before has to do
        if checkpoints is not None and log.step > start and not state["step"].is_deleted():
            log.fetch()
            if log.step == int(state["step"]):
                checkpoints.save(log.step, state, log.unlogged)
        raise
    except FloatingPointError as error:
        kept = None if checkpoints is None else checkpoints.latest_step()
        where = "no checkpoint was written" if kept is None else f"the last good checkpoint is step {kept}"
        raise FloatingPointError(f"{error}; {where}") from None
    finally:
        if checkpoints is not None:
            checkpoints.close()
    if plan.mesh is not None:
        state = {"params": gather(state["params"])}
    trained = _trained_model(model, config, state)
    if folder is not None:
        folder.finish(trained)
    return Run(trained, log.history, None if folder is None else folder.path)


def _place(batch: Batch, mesh: Mesh | None) -> Any:
    return batch if mesh is None else shard_batch(batch, mesh)


def with_dropout(config: GPT2Config, rate: float | None) -> GPT2Config:
    """The configuration with all three dropout rates set to `rate`, or as it is for None."""
    if rate is None:
        return config
    return dataclasses.replace(config, embd_pdrop=rate, attn_pdrop=rate, resid_pdrop=rate)


def _fresh_state(model: LanguageModel, config: FinetuneConfig, optimizer: Any) -> TrainState:
    if config.lora is None:
        # the step donates its state; the model stays as it is
        trainable = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), model.params)
    else:
        trainable = init_adapters(model.config, config.lora, config.seed, params=model.params)
    state = init_state(trainable, optimizer, loss_scaling=config.compute_dtype == "float16")
    # bound to its device, as a restored one is: both take the very same compiled step
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, state))


def _trained_model(model: LanguageModel, config: FinetuneConfig, state: TrainState) -> LanguageModel:
    if config.lora is None:
        return dataclasses.replace(model, params=state["params"])
    return dataclasses.replace(model, adapters=state["params"], lora=config.lora)


class _Log:
    """Collects the metrics of every step, one step behind the device, into entries of the history."""

    def __init__(
        self,
        config: FinetuneConfig,
        plan: _Plan,
        folder: RunFolder | None,
        start: int,
        unlogged: list[dict[str, float]],
    ):
        self._config, self._folder = config, folder
        self._schedule = make_schedule(config, plan.steps)
        self.step = start
        self.history = [] if folder is None else folder.read_metrics(up_to=start)
        logged = self.history[-1]["step"] if self.history else 0
        self.unlogged = [entry for entry in unlogged if entry["step"] > logged]
        self._tokens = self.history[-1]["tokens"] if self.history else 0
        self._seconds = self.history[-1]["seconds"] if self.history else 0.0
        self._pending: tuple[int, Any] | None = None
        self._clock = time.perf_counter()
        self._timed_tokens, self._timed_seconds = 0.0, 0.0
        self._first = True

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes a step's metrics, and fetches those of the step before."""
        self.fetch()
        self._pending = (step, metrics)
        self.step = step
        if self._first:  # it compiled: not part of the speed
            self.fetch()
            self.pause()
            self._timed_tokens = 0.0
            self._first = False

    def fetch(self) -> None:
        """Waits for the pending step, and stops the run if it is not finite."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._check(step, values)
        self.unlogged.append({"step": step, **values})
        self._timed_tokens += values["tokens"]

    def pause(self) -> None:
        """Takes the time since the last call out of the speed: compilation, validation."""
        self.fetch()
        now = time.perf_counter()
        if not self._first:
            self._timed_seconds += now - self._clock
        self._seconds += now - self._clock
        self._clock = now

    def flush(self, extra: dict[str, float]) -> dict[str, float]:
        """One entry of the history over all steps since the last one."""
        self.fetch()
        now = time.perf_counter()
        if not extra:  # a validation took the time since the pause
            self._timed_seconds += now - self._clock
        self._seconds += now - self._clock
        self._clock = now
        last = self.unlogged[-1]
        self._tokens += sum(entry["tokens"] for entry in self.unlogged)
        updates = last["step"] - int(last.get("skipped", 0))  # a skipped step leaves the schedule where it is
        entry = {
            "step": last["step"],
            "loss": _mean(self.unlogged, "loss"),
            "accuracy": _mean(self.unlogged, "accuracy"),
            "tokens": self._tokens,
            "learning_rate": float(np.asarray(self._schedule(max(updates - 1, 0)))),
            "grad_norm": last["grad_norm"],
            "seconds": round(self._seconds, 3),
        }
        entry |= {name: last[name] for name in ("loss_scale", "skipped") if name in last} | extra
        if self._timed_seconds > 0 and self._timed_tokens > 0:
            entry["tokens_per_second"] = round(self._timed_tokens / self._timed_seconds, 1)
        entry = {name: value for name, value in entry.items() if math.isfinite(value)}  # JSON knows no others
        if self._folder is not None:
            self._folder.append_metrics(entry)
        self.history.append(entry)
        self.unlogged, self._timed_tokens, self._timed_seconds = [], 0.0, 0.0
        return entry

    def _check(self, step: int, values: dict[str, float]) -> None:
        if self._config.compute_dtype == "float16":
            if not math.isfinite(values["grad_norm"]) and values["loss_scale"] <= MIN_SCALE:
                raise FloatingPointError(
                    f"step {step}: the gradient overflows even at loss scale {MIN_SCALE}"
                )
        elif not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise FloatingPointError(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; "
                "a lower learning_rate or a longer warmup_steps helps as a rule"
            )


def _mean(steps: list[dict[str, float]], name: str) -> float:
    """Mean per token."""
    return sum(e[name] * e["tokens"] for e in steps) / max(sum(e["tokens"] for e in steps), 1.0)


def validation_loss(
    trainable: Any,
    *,
    model: LanguageModel,
    config: FinetuneConfig,
    documents: Documents,
    length: int,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Loss and accuracy per token on held-out documents, laid out as the training batches are."""
    params, adapters = (trainable, None) if config.lora is None else (model.params, trainable)
    sums = np.zeros(3)
    batches = _validation_batches(model, config, documents, length)
    for batch in batches:
        scale = config.lora.scales(model.config.n_layer) if config.lora else 1.0
        sums += np.asarray(
            _batch_sums(
                params, adapters, _place(batch, mesh), model.config, precision(config.compute_dtype), scale
            ),
            np.float64,
        )
    return {"validation_loss": float(sums[0] / sums[2]), "validation_accuracy": float(sums[1] / sums[2])}


def _validation_batches(
    model: LanguageModel, config: FinetuneConfig, documents: Documents, length: int
) -> Iterator[Batch]:
    return sequential_batches(
        documents,
        layout=config.layout,
        sequence_length=length,
        batch_size=config.batch_size // config.accumulation,
        end_token_id=model.end_token_id,
    )


@functools.partial(jax.jit, static_argnums=(3, 4))
def _batch_sums(params, adapters, batch, config, numerics, lora_scale):
    hidden = hidden_states(
        params,
        config,
        batch["tokens"],
        segment_ids=batch.get("segment_ids"),
        precision=numerics,
        adapters=adapters,
        lora_scale=lora_scale,
    )
    nll, hit = token_losses(hidden, head_kernel(params), batch["targets"], numerics)
    weights = batch["weights"]
    return jnp.stack([(nll * weights).sum(), (hit * weights).sum(), weights.sum()])
