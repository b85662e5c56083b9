"""Settings of a fine-tuning run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from gpt2jax.data.batches import LAYOUTS
from gpt2jax.lora.config import BASE_DTYPES, LoRAConfig
from gpt2jax.model.gpt2 import REMAT
from gpt2jax.ops.precision import COMPUTE_DTYPES
from gpt2jax.utils.validation import check_count, check_path, check_seed, is_number, set_field

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "sgd")
SCHEDULES = ("constant", "linear", "cosine", "wsd")
MOMENT_DTYPES = ("float32", "bfloat16")
TRACKERS = ("tensorboard", "wandb")


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """How to train.

    Attributes:
        steps: optimizer steps. None: as many as make `epochs`.
        epochs: passes over the training texts; used when `steps` is None.
        batch_size: rows of one optimizer step.
        accumulation: cut each batch into this many equal parts that are computed one after the other: less memory,
            same result. `batch_size` must be a multiple of it.
        sequence_length: T, tokens of one row. None: the model's context, at most 1024.
        layout: "windows" trains on every token of the texts, joined by end tokens and cut into rows; "packed" puts
            several texts into a row, each with attention and positions of its own; "documents" is the study's: one
            row a text, its first T - 1 tokens and the end token.
        optimizer: "adamw"; "adafactor" (second moments as rows and columns: little memory); "lion" (sign of the
            momentum: one moment); "sgd" (momentum `beta1`); or "muon": orthogonalised momentum for the kernels of
            the blocks, Adam without decay for the rest; it learns faster from scratch. Not for LoRA.
        learning_rate: peak of the schedule. None: 1e-3 for a model under 20 million parameters, 1e-4 for a larger
            one; ten times that for LoRA, a fifth for lion, a hundred times for sgd.
        schedule: after the warm-up: "cosine" or "linear" fall to the end, "constant", or "wsd" (warm-up, stable,
            decay): constant, then linear over the last `decay_share`.
        warmup_steps: linear rise to the peak, at most all steps but one.
        final_learning_rate: the schedule ends at this share of the peak ("constant" does not).
        decay_share: share of the steps in which "wsd" falls.
        weight_decay: decoupled, on matrices only (never on biases and LayerNorms).
        beta1: decay of the optimizer's mean of gradients. Adafactor has none.
        beta2: decay of its mean of squared gradients; of lion's momentum, at most 0.99. Adafactor has its own rule.
        epsilon: added to the root of the latter.
        max_grad_norm: the gradient is scaled down to this global norm; None: never.
        moments_dtype: "bfloat16" keeps the optimizer's moments in half the memory, rounded at random so that small
            changes add up.
        ema_decay: of a moving average of the parameters, which is then what is validated and returned; None: none.
        freeze: parameters that stay as they are: names such as "wte", "h.0", "h.*.attn.c_proj.bias", with "*", "?"
            and "[0-5]"; a name stands for all below it. Not with LoRA, which trains adapters only.
        lora_plus_ratio: learning rate of LoRA's second factor (`lora_b`) over that of the first (LoRA+: 16).
        label_smoothing: share of the label's weight that is spread over all tokens. The logged loss is without it.
        z_loss: weight of the square of log(sum(exp(logits))), which keeps logits from drifting. Not in the log either.
        remat: what is computed again in the backward pass, in place of being kept: "none" of it, all but matrix
            products ("dots"), all but those with weights ("weights"), or all of each block ("full").
        dropout: overrides the model's three dropout rates; None: as the model says.
        compute_dtype: operands of matrix products: "float32", "bfloat16", or "float16" (with dynamic loss scaling).
            Parameters, moments, softmax and loss are float32 always.
        lora: train low-rank adapters instead of the parameters; None: all parameters.
        base_dtype: with `lora`, of the frozen parameters that are trained on: "float32", "bfloat16" (which saves on
            accelerators only: XLA widens it on a CPU), or "int8", one byte for each weight of the blocks and bfloat16
            for the embeddings. It is a copy: the result has the model's own parameters, for which a library call
            best takes a model in the host's memory (`jax.device_get(model.params)`). None: the model's own.
        fsdp: devices that share one copy of parameters and moments, each holding a part. Devices that `fsdp` and
            `tensor_parallel` leave over are data parallel.
        tensor_parallel: devices that share the work of one row, each with some of the heads and of the mlp.
        seed: of the order of the batches, dropout and new adapters.
        log_every: steps between two lines of the log.
        eval_every: steps between two validations; None: three in a run. One at the end always.
        checkpoint_every: steps between two checkpoints; None: three in a run. One at the end always.
        keep_checkpoints: how many of the newest checkpoints to keep.
        keep_best: keep the parameters of the best validation loss too (in `best/`); they are then the result.
        patience: end after so many validations in a row without a better loss; the result is the best. None: never.
        max_minutes: end, as after the last step, when the run has taken so long since it began or was resumed.
        track: "tensorboard" and "wandb" write the log for these too, into the run folder (wandb offline unless
            WANDB_MODE says otherwise).
        token_cache: folder where tokenized texts are kept for later runs and mapped into memory; None: nowhere.

    Raises:
        ValueError: a field has an impossible value; the message names field, value and what is legal.
    """

    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 16
    accumulation: int = 1
    sequence_length: int | None = None
    layout: str = "windows"
    optimizer: str = "adamw"
    learning_rate: float | None = None
    schedule: str = "cosine"
    warmup_steps: int = 0
    final_learning_rate: float = 0.1
    decay_share: float = 0.2
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0
    moments_dtype: str = "float32"
    ema_decay: float | None = None
    freeze: tuple[str, ...] = ()
    lora_plus_ratio: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    remat: str = "none"
    dropout: float | None = None
    compute_dtype: str = "float32"
    lora: LoRAConfig | None = None
    base_dtype: str | None = None
    fsdp: int = 1
    tensor_parallel: int = 1
    seed: int = 0
    log_every: int = 10
    eval_every: int | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    keep_best: bool = False
    patience: int | None = None
    max_minutes: float | None = None
    track: tuple[str, ...] = ()
    token_cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "sequence_length", "eval_every", "checkpoint_every", "patience"):
            if getattr(self, name) is not None:
                set_field(self, name, check_count(name, getattr(self, name)))
        for name in (
            "batch_size",
            "accumulation",
            "fsdp",
            "tensor_parallel",
            "log_every",
            "keep_checkpoints",
        ):
            set_field(self, name, check_count(name, getattr(self, name)))
        set_field(self, "warmup_steps", check_count("warmup_steps", self.warmup_steps, 0))
        set_field(self, "seed", check_seed(self.seed))
        for name in ("epochs", "epsilon", "lora_plus_ratio"):
            self._check_number(name, lambda x: x > 0, "a positive number")
        for name in ("learning_rate", "max_grad_norm", "max_minutes"):
            if getattr(self, name) is not None:
                self._check_number(name, lambda x: x > 0, "a positive number, or None")
        for name in ("weight_decay", "final_learning_rate", "z_loss"):
            self._check_number(name, lambda x: x >= 0, "a number that is at least 0")
        for name in ("beta1", "beta2", "label_smoothing"):
            self._check_number(name, lambda x: 0 <= x < 1, "at least 0 and below 1")
        for name in ("dropout", "ema_decay"):
            if getattr(self, name) is not None:
                self._check_number(name, lambda x: 0 <= x < 1, "at least 0 and below 1, or None")
        self._check_number("decay_share", lambda x: 0 < x <= 1, "above 0 and at most 1")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of accumulation={self.accumulation}"
            )
        for name, known in (
            ("layout", LAYOUTS),
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("moments_dtype", MOMENT_DTYPES),
            ("compute_dtype", COMPUTE_DTYPES),
            ("remat", REMAT),
        ):
            self._check_known(name, getattr(self, name), known)
        if self.lora is not None and not isinstance(self.lora, LoRAConfig):
            raise ValueError(f"lora={self.lora!r:.60} must be a LoRAConfig, or None")
        if self.base_dtype is not None:
            self._check_known("base_dtype", self.base_dtype, BASE_DTYPES)
            if self.lora is None:
                raise ValueError(f"base_dtype={self.base_dtype!r} is for LoRA only; expected None")
        for name in ("freeze", "track"):
            self._set_names(name)
        for name in self.track:
            self._check_known("track", name, TRACKERS)
        if not isinstance(self.keep_best, bool):
            raise ValueError(f"keep_best={self.keep_best!r:.60} must be True or False")
        if self.token_cache is not None:
            set_field(self, "token_cache", str(check_path("token_cache", self.token_cache)))
        if self.optimizer == "muon" and self.lora is not None:
            raise ValueError("optimizer='muon' does not train LoRA adapters; use 'adamw'")
        if self.freeze and self.lora is not None:
            raise ValueError(
                f"freeze={self.freeze!r} has nothing to freeze: LoRA trains adapters only; choose its targets instead"
            )
        if self.lora_plus_ratio != 1 and self.lora is None:
            raise ValueError(f"lora_plus_ratio={self.lora_plus_ratio!r} is for LoRA only; expected 1")

    def _set_names(self, name: str) -> None:
        value = getattr(self, name)
        names = (value,) if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not all(isinstance(x, str) and x for x in names):
            raise ValueError(f"{name}={value!r:.60} must be a list of names, none of them empty")
        set_field(self, name, tuple(names))

    def _check_known(self, name: str, value: object, known: tuple[str, ...]) -> None:
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"{name}={value!r:.60} is not known; known: {', '.join(known)}")

    def _check_number(self, name: str, legal: Callable[[float], bool], expected: str) -> None:
        value = getattr(self, name)
        if not is_number(value) or not legal(value):
            raise ValueError(f"{name}={value!r:.60} must be {expected}")
        set_field(self, name, float(value))
