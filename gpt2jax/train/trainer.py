"""The training loop: a step, then what is due after it, until the run ends."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

from gpt2jax.data.batches import Batches
from gpt2jax.data.documents import Documents
from gpt2jax.language_model import LanguageModel
from gpt2jax.ops.device import host_memory_bytes
from gpt2jax.ops.precision import Precision
from gpt2jax.sharding import make_mesh, num_batch_shards, use_mesh
from gpt2jax.train.checkpoint import BestCheckpoint, Checkpoints
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.log import NonFiniteError, TrainLog
from gpt2jax.train.optimizer import make_optimizer
from gpt2jax.train.run_folder import RunFolder
from gpt2jax.train.state import starting_state, trained_model
from gpt2jax.train.step import make_configured_step, with_dropout
from gpt2jax.train.stopping import StopController, explain_interrupt
from gpt2jax.train.trackers import open_trackers
from gpt2jax.train.unrolled import stack_layers
from gpt2jax.train.validation import place, validation_loss
from gpt2jax.utils.notices import count_noun
from gpt2jax.utils.progress import training_progress
from gpt2jax.utils.validation import must_be
from gpt2jax.weights.orbax import eval_params

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PACKINGS = {
    "concat": "every token of the texts, joined (concat)",
    "packed": "every token of the texts, kept apart (packed)",
    "padded": "the first tokens of each text (padded)",
}


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What follows from settings, data and devices: batches, the number of steps, and when to do what."""

    mesh: Mesh | None
    batches: Batches
    steps: int
    eval_every: int
    checkpoint_every: int

    def describe(self, config: FinetuneConfig) -> str:
        """Say what a run does: steps, epochs, rows, precision and devices."""
        batches, devices, rate = self.batches, jax.devices(), config.learning_rate
        epochs = self.steps * config.batch_size / batches.rows
        return (
            f"{count_noun(self.steps, 'step')} of {count_noun(config.batch_size, 'row')}, "
            f"{count_noun(epochs, 'epoch')} of {count_noun(batches.rows, 'row')}; "
            f"rows of {batches.sequence_length:,} tokens, {_PACKINGS[config.packing]}; "
            f"{config.optimizer} with learning rate {rate:g}, {config.compute_dtype}, "
            f"{count_noun(len(devices), 'device')} ({devices[0].platform})"
        )


def plan_run(model: LanguageModel, config: FinetuneConfig, documents: Documents) -> RunPlan:
    """Plan a run.

    Raises:
        ValueError: rows are longer than the model's context, the documents hold nothing to predict, or the devices
            cannot share the batch.
    """
    context = model.config.n_positions
    length = config.sequence_length or min(context, 1024)
    if length > context:
        raise ValueError(
            must_be("sequence_length", f"at most the model's context of {context} tokens", length)
        )
    _check_batch_size(config, length, model.config.n_embd)
    batches = Batches(documents, config.packing, length, config.batch_size, model.end_token_id, config.seed)
    steps = config.steps or max(1, math.ceil(config.epochs * batches.rows / config.batch_size))
    third = max(1, math.ceil(steps / 3))
    mesh = _make_mesh(config)
    return RunPlan(mesh, batches, steps, config.eval_every or third, config.checkpoint_every or third)


def _check_batch_size(config: FinetuneConfig, length: int, width: int) -> None:
    """Raise ValueError for a batch that this machine can't hold, which would fill it before an error comes.

    Counted is the least: tokens and labels, and on a CPU the input of one layer in 16 bits.
    """
    memory = host_memory_bytes()
    per_row = 8 * length
    if jax.default_backend() == "cpu":
        per_row += 2 * length * width // config.gradient_accumulation_steps
    if memory is not None and config.batch_size * per_row > memory * jax.process_count():
        most = memory * jax.process_count() // per_row
        legal = f"at most {most:,} for rows of {length:,} tokens"
        hint = f"; this machine has {memory / 1e9:,.0f} GB"
        raise ValueError(must_be("batch_size", legal, config.batch_size) + hint)


def _make_mesh(config: FinetuneConfig) -> Mesh | None:
    """Arrange all devices as the settings say; None for a single device."""
    if jax.device_count() == config.fsdp == config.tensor_parallel == 1:
        return None
    mesh = make_mesh(fsdp=config.fsdp, tensor=config.tensor_parallel)
    parts, shards = config.gradient_accumulation_steps, num_batch_shards(mesh)
    if config.batch_size // parts % shards:
        per_part = "" if parts == 1 else f" gradient_accumulation_steps={parts} times"
        legal = f"a multiple of{per_part} {shards} devices"
        raise ValueError(must_be("batch_size", legal, config.batch_size))
    return mesh


@dataclasses.dataclass(frozen=True)
class Run:
    """The result of a fine-tuning.

    Attributes:
        model: the trained model; with LoRA the given model and its adapters, with its own parameters whatever
            `base_dtype` the adapters were trained on.
        history: one dict a logged step: step, loss (mean per token since the last entry, nats), accuracy, tokens
            (since the beginning), learning_rate, grad_norm, tokens_per_second, seconds; validation_loss and
            validation_accuracy after a validation; loss_scale and skipped with float16.
        output: the run folder, or None.
    """

    model: LanguageModel
    history: list[dict[str, float]]
    output: pathlib.Path | None

    def plot_loss(self) -> Figure:
        """Draw the training and validation loss by step as a `matplotlib.figure.Figure`."""
        from gpt2jax.report.plots import training_figure

        return training_figure(self.history)

    def _repr_html_(self) -> str:
        from gpt2jax.report.notebook import run_html

        return run_html(self)


@dataclasses.dataclass(frozen=True)
class Action:
    """Something that a run does after a step, if it is due."""

    is_due: Callable[[], bool]
    run: Callable[[], None]


class Trainer:
    """A run: its state, and all that it keeps open while it trains.

        with Trainer(model, config, plan, validation, folder) as trainer:
            trainer.train()
        run = trainer.finish()

    Args:
        model: where to start; without adapters.
        config: settings, with a learning rate.
        plan: of the run.
        validation: held-out documents, or None.
        folder: the run folder, locked and begun, or None. A checkpoint in it is where the run goes on.
        show_progress: show a progress bar.

    Attributes:
        step: steps done.
        is_last_step: the run ends after this step.
        actions: what may be due after a step. Order matters: an entry of the log holds the validation, patience
            follows from the log, and a checkpoint holds the metrics that are not in the log yet.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: FinetuneConfig,
        plan: RunPlan,
        validation: Documents | None = None,
        folder: RunFolder | None = None,
        *,
        show_progress: bool = False,
    ):
        self.model, self.config, self.plan, self.folder = model, config, plan, folder
        self._held_out, self._show_progress = validation, show_progress
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Trainer:
        with contextlib.ExitStack() as stack:
            self._start(stack)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _start(self, stack: contextlib.ExitStack) -> None:
        """Build or restore the state, and open everything that `stack` closes again."""
        config, plan, folder = self.config, self.plan, self.folder
        optimizer = make_optimizer(config, plan.steps)
        self._checkpoints = self._best = None
        if folder is not None:
            self._checkpoints = Checkpoints(
                folder.checkpoints, keep=config.keep_checkpoints, run=folder.description
            )
        self.state, self.frozen, mask, pending_metrics = starting_state(
            self.model,
            config,
            optimizer,
            length=plan.batches.sequence_length,
            mesh=plan.mesh,
            checkpoints=self._checkpoints,
        )
        self.step = self._first_step = int(self.state["step"])
        self.is_last_step = self.step == plan.steps
        self._step_function = make_configured_step(
            with_dropout(self.model.config, config),
            config,
            optimizer,
            Precision.for_device(config.compute_dtype),
            mask=mask,
        )
        if config.keep_best or config.patience is not None:
            self._best = BestCheckpoint(None if folder is None else folder.best)
        trackers = open_trackers(config, folder, self.step)
        for tracker in trackers:
            stack.callback(tracker.close)
        writers = [tracker.write for tracker in trackers]
        self.log = TrainLog(config, plan.steps, folder, self.step, pending_metrics, writers)
        self.controller = stack.enter_context(StopController(config, self.log.history))
        for resource in (self._best, self._checkpoints):
            if resource is not None:
                stack.callback(resource.close)
        self._report = stack.enter_context(training_progress(plan.steps, self.step, show=self._show_progress))
        stack.enter_context(use_mesh(plan.mesh))
        self.figures: dict[str, float] = {}  # of a validation of the current step
        self.actions = self._list_actions()

    def _list_actions(self) -> list[Action]:
        actions = []
        if self._held_out is not None:
            actions.append(Action(self._every(self.plan.eval_every), self.validate))
        if self._best is not None:
            actions.append(Action(self._is_best, self.keep_best))
        actions.append(Action(self._is_log_due, self.write_log))
        if self._checkpoints is not None:
            actions.append(Action(self._every(self.plan.checkpoint_every), self.save_checkpoint))
        return actions

    def train(self) -> None:
        """Train until the last step, or until the run is to stop.

        Raises:
            Interrupted: a signal came; the state is saved, and the message says how to go on.
            FloatingPointError: the loss is not finite any more, or every step was skipped.
            ValueError: no batch held a token to learn.
        """
        try:
            if self.controller.patience_exhausted():  # of a run that had ended before it was resumed
                return
            if self.log.pending_metrics:  # it had stopped between a step and what was due after it
                self.run_due_actions()
            while not self.is_last_step:
                self.train_step()
                self.run_due_actions()
            self._check_learned()
        except KeyboardInterrupt as interrupt:
            self._save_interrupted()
            raise explain_interrupt(interrupt, self._checkpoints, self.folder) from None
        except NonFiniteError as error:
            if self.log.pending_metrics:  # the way there belongs in the log
                self.log.flush({})
            raise self._explain(error) from None

    def train_step(self) -> None:
        """Dispatch one step; while it runs, the log fetches the metrics of the step before."""
        batch = place(self.plan.batches.batch(self.step), self.plan.mesh)
        self.state, metrics = self._step_function(self.state, self.frozen, batch)
        self.step += 1
        self.log.add(self.step, metrics)

    def run_due_actions(self) -> None:
        """Do what is due after the current step; then raise Interrupted if a signal came."""
        self.controller.sync(self.step)
        self.is_last_step = self.step == self.plan.steps or self.controller.time_limit_reached()
        self.figures = {}
        for action in self.actions:
            if action.is_due():
                action.run()
        self.controller.raise_if_signalled()

    def _check_learned(self) -> None:
        """Raise an error if the run has not changed the model."""
        last = self.log.history[-1]
        if not last["tokens"]:
            raise ValueError(
                f"all {self.step} batches held prompts and padding only: nothing was learned; more steps, a larger "
                "batch_size or a larger sequence_length help"
            )
        if last.get("skipped", 0) >= self.step:
            raise FloatingPointError(
                f"all {self.step} steps were skipped, because their gradients overflow float16: nothing was learned; "
                "compute_dtype bfloat16 or float32, or more steps, helps: each skipped step halves the loss scale"
            )

    def _every(self, steps: int) -> Callable[[], bool]:
        return lambda: self.step % steps == 0 or self.is_last_step

    def validate(self) -> None:
        """Compute the figures of the held-out documents, which the next entry of the log holds."""
        assert self._held_out is not None
        self.log.pause()
        self.figures = validation_loss(
            eval_params(self.state),
            model=self.model,
            config=self.config,
            documents=self._held_out,
            length=self.plan.batches.sequence_length,
            frozen=self.frozen,
            mesh=self.plan.mesh,
        )

    def _is_best(self) -> bool:
        return bool(self.figures) and self.controller.is_best(self.figures["validation_loss"])

    def keep_best(self) -> None:
        """Keep the parameters, which had the best validation so far."""
        assert self._best is not None
        self._best.save(self.step, stack_layers(eval_params(self.state)))

    def _is_log_due(self) -> bool:
        return bool(self.figures) or self._every(self.config.log_every)()

    def write_log(self) -> None:
        """Write an entry of the log; the run ends here if it shows that patience is exhausted."""
        self._report(self.step, self.log.flush(self.figures))
        self.is_last_step = self.is_last_step or self.controller.patience_exhausted()

    def save_checkpoint(self) -> None:
        """Save the state in the background."""
        assert self._checkpoints is not None
        self.log.fetch()
        self._checkpoints.save(self.step, stack_layers(self.state), self.log.pending_metrics)

    def _save_interrupted(self) -> None:
        """Save the state at an interrupt, unless that came between a step and its metrics."""
        has_state = self.log.step > self._first_step and not self.state["step"].is_deleted()
        if self._checkpoints is not None and has_state:
            self.log.fetch()
            if self.log.step == int(self.state["step"]):
                self._checkpoints.save(self.log.step, stack_layers(self.state), self.log.pending_metrics)

    def _explain(self, error: NonFiniteError) -> FloatingPointError:
        """Return the error with the documents of its batch and the last good checkpoint."""
        good = None if self._checkpoints is None else self._checkpoints.last_finite_step(error.first)
        where = "there is no checkpoint from before"
        if self.folder is not None and good is not None:
            path = self.folder.checkpoints / str(good)
            where = f"the last good checkpoint is step {good}, a model at {path}"
        ids = self.plan.batches.documents_of(error.step - 1)
        shown = ", ".join(map(str, ids[:20])) + (", ..." if len(ids) > 20 else "")
        return FloatingPointError(
            f"{error}; its batch, number {error.step - 1}, holds documents {shown}; {where}"
        )

    def finish(self) -> Run:
        """Build the trained model and save it into the run folder; the trainer has no state afterwards."""
        result = stack_layers(eval_params(self.state))
        if self._best is not None:
            result = self._best.restore(result)
        frozen = None if self.config.lora is not None else self.frozen
        del self.state, self.frozen  # the device may not hold them and the model's own parameters
        model = trained_model(self.model, self.config, result, frozen, self.plan.mesh)
        if self.folder is not None:
            self.folder.finish(model, self.log.history)
        return Run(model, self.log.history, None if self.folder is None else self.folder.path)
