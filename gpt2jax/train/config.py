"""Settings of a fine-tuning run."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from gpt2jax.lora.config import LoRAConfig
from gpt2jax.utils.validation import (
    Rule,
    array_size,
    check_path,
    each,
    in_range,
    instance_of,
    must_be,
    non_empty_string,
    non_negative_int,
    one_of,
    positive_int,
    positive_number,
    validated,
)
from gpt2jax.utils.validation import seed as seed_rule

TRACKERS = ("tensorboard", "wandb")
non_negative = in_range(0)
below_one = in_range(0, 1, open_end=True)


def _one_or_more(item: Rule) -> Rule:
    """Build the rule of lists whose items obey `item`; a single text is a list of one."""
    items = each(item)
    return Rule(items.legal, lambda value: items.convert((value,) if isinstance(value, str) else value))


path = Rule("a name or a path, and not empty", lambda value: str(check_path("", value)))


@validated
@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """How to train.

    Attributes:
        steps: optimizer steps. None: as many as make `epochs`.
        epochs: passes over the training texts; used if `steps` is None.
        batch_size: rows of one optimizer step.
        gradient_accumulation_steps: split each batch into this many equal parts that are computed one after the
            other: less memory, same result. `batch_size` must be a multiple of it.
        sequence_length: T, tokens of one row. None: the model's context, at most 1024.
        packing: "concat" trains on every token of the texts, joined by end tokens and split into rows; "packed" puts
            several texts into a row, each with its own attention and positions; "padded" has one text a row, its
            first T - 1 tokens and the end token, as in the Keras baseline.
        optimizer: "adamw"; "adafactor" (second moments as rows and columns: little memory); "lion" (sign of the
            momentum: one moment); "sgd" (momentum `beta1`); or "muon": orthogonalised momentum for the kernels of
            the blocks, Adam without decay for the rest; it learns faster from scratch. Not for LoRA.
        learning_rate: peak of the schedule. None: 1e-3 for a model under 20 million parameters, 1e-4 for a larger
            one; ten times that for LoRA, a fifth for lion, a hundred times for sgd.
        schedule: after the warm-up: "cosine" or "linear" fall to the end, "constant", or "wsd" (warm-up, stable,
            decay): constant, then linear over the last `decay_fraction`.
        warmup_steps: linear rise to the peak, at most all steps but one.
        final_lr_ratio: the schedule ends at this fraction of the peak ("constant" stays at the peak).
        decay_fraction: fraction of the steps in which "wsd" falls.
        weight_decay: decoupled, on matrices only (never on biases and LayerNorms).
        beta1: decay of the optimizer's mean of gradients. Adafactor has none.
        beta2: decay of its mean of squared gradients; of lion's momentum, at most 0.99. Adafactor has its own rule.
        epsilon: added to the root of the mean of squared gradients.
        max_grad_norm: gradients are scaled down to this global norm; None: never.
        moments_dtype: "bfloat16" keeps the optimizer's moments in half the memory, with stochastic rounding so that
            small changes add up.
        ema_decay: of a moving average of the parameters, which is then what is validated and returned; None: none.
        freeze: parameters that stay as they are: names such as "wte", "h.0", "h.*.attn.c_proj.bias", with "*", "?"
            and "[0-5]"; a name stands for all below it. Not with LoRA, which trains adapters only.
        lora_plus_ratio: learning rate of LoRA's second factor (`lora_b`) over that of the first (LoRA+: 16).
        label_smoothing: fraction of the label's probability that is spread over all tokens. The logged loss is
            without it.
        z_loss: weight of the square of log(sum(exp(logits))), which keeps logits from drifting. Not in the log either.
        remat: what the backward pass computes again instead of keeping it: "none" of it, all but matrix products
            ("dots"), all but those with weights ("weights"), or all of each block ("full").
        dropout: overrides the model's three dropout rates; None: as the model says.
        attention_dropout: overrides the rate of the attention's probabilities alone; 0 allows a GPU its fused attention
            while the other rates stay. None: as `dropout` says.
        compute_dtype: operands of matrix products: "float32", "bfloat16", "float16" (with dynamic loss scaling), or
            "tensorfloat32": float32 whose products round their operands to 10 bits on NVIDIA GPUs of capability 8.0 or
            more, where they are several times as fast; elsewhere the same as float32.
            Parameters, moments, softmax and loss are float32 always.
        lora: train low-rank adapters instead of the parameters; None: all parameters.
        base_dtype: with `lora`, of the copy of the frozen parameters that is trained on: "float32", "bfloat16" (which
            saves on accelerators only: XLA upcasts it on a CPU), or "int8", one byte for each weight of the blocks
            and bfloat16 for the embeddings. The result has the model's own parameters; if the model holds these as
            NumPy arrays (`jax.device_get(model.params)`), the device has only the copy meanwhile. None: no copy.
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
        trackers: "tensorboard" and "wandb" write the log for these too, into the run folder (wandb offline unless
            WANDB_MODE says otherwise).
        token_cache: folder where tokenized texts are kept for later runs and mapped into memory; None: nowhere.

    Raises:
        ValueError: a field has an illegal value; the message names field, legal values and the value.
    """

    steps: Annotated[int | None, positive_int] = None
    epochs: Annotated[float, positive_number] = 1.0
    batch_size: Annotated[int, array_size] = 16
    gradient_accumulation_steps: Annotated[int, array_size] = 1
    sequence_length: Annotated[int | None, positive_int] = None
    packing: Literal["concat", "packed", "padded"] = "concat"
    optimizer: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"
    learning_rate: Annotated[float | None, positive_number] = None
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: Annotated[int, non_negative_int] = 0
    final_lr_ratio: Annotated[float, non_negative] = 0.1
    decay_fraction: Annotated[float, in_range(0, 1, open_start=True)] = 0.2
    weight_decay: Annotated[float, non_negative] = 0.01
    beta1: Annotated[float, below_one] = 0.9
    beta2: Annotated[float, below_one] = 0.999
    epsilon: Annotated[float, positive_number] = 1e-8
    max_grad_norm: Annotated[float | None, positive_number] = 1.0
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    ema_decay: Annotated[float | None, below_one] = None
    freeze: Annotated[tuple[str, ...], _one_or_more(non_empty_string)] = ()
    lora_plus_ratio: Annotated[float, positive_number] = 1.0
    label_smoothing: Annotated[float, below_one] = 0.0
    z_loss: Annotated[float, non_negative] = 0.0
    remat: Literal["none", "dots", "weights", "full"] = "none"
    dropout: Annotated[float | None, below_one] = None
    attention_dropout: Annotated[float | None, below_one] = None
    compute_dtype: Literal["float32", "tensorfloat32", "bfloat16", "float16"] = "float32"
    lora: Annotated[LoRAConfig | None, instance_of(LoRAConfig)] = None
    base_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    fsdp: Annotated[int, positive_int] = 1
    tensor_parallel: Annotated[int, positive_int] = 1
    seed: Annotated[int, seed_rule] = 0
    log_every: Annotated[int, positive_int] = 10
    eval_every: Annotated[int | None, positive_int] = None
    checkpoint_every: Annotated[int | None, positive_int] = None
    keep_checkpoints: Annotated[int, positive_int] = 2
    keep_best: bool = False
    patience: Annotated[int | None, positive_int] = None
    max_minutes: Annotated[float | None, positive_number] = None
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], _one_or_more(one_of(TRACKERS))] = ()
    token_cache: Annotated[str | None, path] = None

    def __post_init__(self) -> None:
        if self.batch_size % self.gradient_accumulation_steps:
            legal = f"a multiple of gradient_accumulation_steps={self.gradient_accumulation_steps}"
            raise ValueError(must_be("batch_size", legal, self.batch_size))
        if self.lora is None:
            if self.base_dtype is not None:
                raise ValueError(must_be("base_dtype", "None without lora", self.base_dtype))
            if self.lora_plus_ratio != 1:
                raise ValueError(must_be("lora_plus_ratio", "1 without lora", self.lora_plus_ratio))
            return
        if self.optimizer == "muon":
            raise ValueError(must_be("optimizer", "one of adamw, adafactor, lion, sgd with lora", "muon"))
        if self.freeze:
            problem = must_be("freeze", "empty with lora", self.freeze)
            raise ValueError(f"{problem}; LoRA trains adapters only: choose its targets instead")
