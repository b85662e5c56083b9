"""Settings of a fine-tuning run."""

from __future__ import annotations

import dataclasses
import math

from gpt2jax.data.batches import LAYOUTS
from gpt2jax.lora import LoRAConfig
from gpt2jax.precision import COMPUTE_DTYPES

OPTIMIZERS = ("adamw", "muon")


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
        layout: "windows" trains on every token of the texts, joined by end tokens and cut into rows; "documents" is
            the study's: one row a text, its first T - 1 tokens and the end token.
        optimizer: "adamw", or "muon": orthogonalised momentum for the kernels of the blocks, Adam without decay for
            the rest; it learns faster from scratch. Not for LoRA.
        learning_rate: peak of the schedule. None: 1e-3 for a model under 20 million parameters, 1e-4 for a larger
            one, and five times that for LoRA.
        warmup_steps: linear rise to it.
        final_learning_rate: the cosine ends at this share of the peak.
        weight_decay: decoupled, on matrices only (never on biases and LayerNorms).
        beta1: decay of the optimizer's mean of gradients.
        beta2: decay of its mean of squared gradients.
        epsilon: added to the root of the latter.
        max_grad_norm: the gradient is scaled down to this global norm; None: never.
        dropout: overrides the model's three dropout rates; None: as the model says.
        compute_dtype: operands of matrix products: "float32", "bfloat16", or "float16" (with dynamic loss scaling).
            Parameters, moments, softmax and loss are float32 always.
        lora: train low-rank adapters instead of the parameters; None: all parameters.
        fsdp: devices that share one copy of parameters and moments, each holding a part. Devices that `fsdp` and
            `tensor_parallel` leave over are data parallel.
        tensor_parallel: devices that share the work of one row, each with some of the heads and of the mlp.
        seed: of the order of the batches, dropout and new adapters.
        log_every: steps between two lines of the log.
        eval_every: steps between two validations; None: three in a run. One at the end always.
        checkpoint_every: steps between two checkpoints; None: three in a run. One at the end always.
        keep_checkpoints: how many of the newest checkpoints to keep.

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
    warmup_steps: int = 0
    final_learning_rate: float = 0.1
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0
    dropout: float | None = None
    compute_dtype: str = "float32"
    lora: LoRAConfig | None = None
    fsdp: int = 1
    tensor_parallel: int = 1
    seed: int = 0
    log_every: int = 10
    eval_every: int | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "sequence_length", "eval_every", "checkpoint_every"):
            if getattr(self, name) is not None:
                self._check_whole(name, minimum=1)
        for name in (
            "batch_size",
            "accumulation",
            "fsdp",
            "tensor_parallel",
            "log_every",
            "keep_checkpoints",
        ):
            self._check_whole(name, minimum=1)
        for name in ("warmup_steps", "seed"):
            self._check_whole(name, minimum=0)
        for name in ("epochs", "epsilon"):
            self._check_number(name, lambda x: x > 0, "a positive number")
        for name in ("learning_rate", "max_grad_norm"):
            if getattr(self, name) is not None:
                self._check_number(name, lambda x: x > 0, "a positive number, or None")
        for name in ("weight_decay", "final_learning_rate"):
            self._check_number(name, lambda x: x >= 0, "a number that is at least 0")
        for name in ("beta1", "beta2"):
            self._check_number(name, lambda x: 0 <= x < 1, "at least 0 and below 1")
        if self.dropout is not None:
            self._check_number("dropout", lambda x: 0 <= x < 1, "at least 0 and below 1, or None")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of accumulation={self.accumulation}"
            )
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r} is not known; known: {', '.join(LAYOUTS)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r} is not known; known: {', '.join(OPTIMIZERS)}")
        if self.optimizer == "muon" and self.lora is not None:
            raise ValueError("optimizer='muon' does not train LoRA adapters; use 'adamw'")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"compute_dtype={self.compute_dtype!r} is not known; known: {', '.join(COMPUTE_DTYPES)}"
            )

    def _check_whole(self, name: str, *, minimum: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {minimum}")

    def _check_number(self, name: str, legal, expected: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, (int, float)) or not math.isfinite(value) or not legal(value):
            raise ValueError(f"{name}={value!r} must be {expected}")
