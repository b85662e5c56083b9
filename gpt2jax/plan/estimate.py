"""A rough estimate of what a training step needs, where XLA can't compile it: bytes by kind, FLOPs, largest batch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from gpt2jax.lora.adapters import cast_base
from gpt2jax.lora.config import LoRAConfig
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params, abstract_params, count_parameters, hidden_states
from gpt2jax.ops.device import Device
from gpt2jax.plan.program import Program, make_program
from gpt2jax.train.config import FinetuneConfig


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device, by kind.

    Attributes:
        parameters: trained and frozen ones, and a moving average.
        optimizer: moments, counts, loss scale.
        batch: token ids and loss mask.
        gradients: of the trained parameters, float32.
        residuals: what the forward pass saves for the backward pass.
    """

    parameters: int
    optimizer: int
    batch: int
    gradients: int
    residuals: int

    @property
    def total(self) -> int:
        """Bytes of all kinds together."""
        return sum(dataclasses.astuple(self))


def estimate_memory(program: Program, *, fsdp: int = 1, tensor: int = 1, devices: int = 1) -> Memory:
    """Estimate the bytes on each of `devices` devices: the arrays that exist when the forward pass ends.

    It is a lower bound without workspace (logits, a block's backward pass, gathered weights): XLA's peak is 1.0 to
    1.4 times this in the cases of benchmarks/accelerators.py.
    """
    state, parts = program.state, program.train.gradient_accumulation_steps
    param_shards, batch_shards = fsdp * tensor, devices // tensor
    gradients = 4 * count_parameters(state["params"])
    if parts > 1:  # those of one part, and their sum
        gradients *= 2
    return Memory(
        parameters=_nbytes((state["params"], program.frozen, state.get("ema"))) // param_shards,
        optimizer=_nbytes((state["optimizer"], state.get("loss_scale"))) // param_shards,
        batch=_nbytes(program.batch) // batch_shards,
        gradients=gradients // param_shards,
        residuals=_residual_bytes(program) // batch_shards,
    )


def _residual_bytes(program: Program) -> int:
    """Return the bytes that the forward pass of one part of the batch saves, read off JAX's own pullback."""
    model, train, lora, precision = program.model, program.train, program.train.lora, program.precision
    if precision.execution.attention == "cudnn":  # it can be traced on a GPU only; this one saves the same
        execution = dataclasses.replace(precision.execution, attention="blockwise")
        precision = dataclasses.replace(precision, execution=execution)
    frozen = program.frozen
    if frozen is not None:
        # int8 kernels save no inputs for a gradient; XLA drops those of other frozen kernels
        frozen = jax.eval_shape(lambda p: cast_base(p, "int8"), abstract_params(model))
    rates = (model.embd_pdrop, model.attn_pdrop, model.resid_pdrop, lora.dropout if lora else 0.0)
    rows, length = train.batch_size // train.gradient_accumulation_steps, program.batch["tokens"].shape[1]

    def pullback(trainable: Params, frozen: Params | None, tokens: jax.Array) -> Any:
        def forward(trainable: Params) -> jax.Array:
            return hidden_states(
                trainable if frozen is None else frozen,
                model,
                tokens,
                precision=precision,
                dropout_key=jax.random.key(0) if any(rates) else None,
                adapters=None if frozen is None else trainable,
                lora_scale=lora.scales(model.n_layer) if lora else 1.0,
                lora_dropout=lora.dropout if lora else 0.0,
                remat=train.remat,
            )

        return jax.vjp(forward, trainable)[1]

    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    saved = jax.tree.leaves(jax.eval_shape(pullback, program.state["params"], frozen, tokens))
    # the rest are parameters, which are counted already
    return _nbytes([leaf for leaf in saved if {rows, length} <= set(leaf.shape)])


def _nbytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def flops_per_token(
    model: GPT2Config, length: int, *, lora: LoRAConfig | None = None, remat: str = "none"
) -> float:
    """Return the FLOPs of matrix products in a training step for each token; a multiply-add counts as two.

    The backward pass has two products for each of the forward pass; with LoRA the frozen weights need one of them.
    Attention is counted in full, without a kernel that skips masked scores. Not XLA's `cost_analysis()`: that counts
    the body of a loop once, for gpt2 on a TPU a sixteenth of this (jax 0.10.2).
    """
    block = 4 * model.n_embd**2 + 2 * model.n_embd * model.mlp_dim
    weights = model.n_layer * block + model.vocab_size * model.n_embd
    attention = 2 * model.n_layer * length * model.n_embd
    forward = 2.0 * (weights + attention)
    frozen = 2.0 * weights if lora is not None else 0.0
    recompute = 2.0 * (model.n_layer * block + attention) if remat == "full" else 0.0
    return 3 * forward - frozen + recompute


def largest_batch(model: GPT2Config, train: FinetuneConfig, device: Device, memory: int, **mesh: int) -> int:
    """Return the most rows whose estimate is at most `memory` bytes a device; 0 if none are.

    Args:
        model: of the run.
        train: settings; their batch size is not used.
        device: facts about it.
        memory: bytes of one device.
        **mesh: fsdp, tensor, devices, as in `estimate_memory`.
    """
    unit = mesh.get("devices", 1) // mesh.get("tensor", 1) * train.gradient_accumulation_steps

    def estimate(units: int) -> int:
        program = make_program(model, dataclasses.replace(train, batch_size=units * unit), device)
        return estimate_memory(program, **mesh).total

    few, more = estimate(8), estimate(16)  # all of it is constant or in proportion to the rows
    return max(0, 8 + (memory - few) // ((more - few) // 8)) * unit
