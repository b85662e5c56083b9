"""What a training step needs, without compiling it: bytes by kind, FLOPs, the largest batch.

Arrays that are arguments are counted as they are. What the forward pass keeps for the backward pass is read off the
traced gradient, so that rematerialisation, LoRA and dtypes need no formulas of their own.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from gpt2jax.config import GPT2Config
from gpt2jax.lora import LoRAConfig
from gpt2jax.losses import chunk_size
from gpt2jax.model import count_parameters
from gpt2jax.plan.program import Program, loss_gradient, make_program
from gpt2jax.train.config import FinetuneConfig


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device, by kind.

    Attributes:
        parameters: trained and frozen ones, and a moving average.
        optimizer: moments, counts, loss scale.
        batch: token ids and weights.
        gradients: of the trained parameters, float32.
        activations: what the forward pass keeps for the backward pass.
        workspace: what one block or one chunk of logits needs while it is computed.
    """

    parameters: int
    optimizer: int
    batch: int
    gradients: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(dataclasses.astuple(self))


def estimate_memory(program: Program, *, fsdp: int = 1, tensor: int = 1, devices: int = 1) -> Memory:
    """Bytes on each of `devices` devices, cut as distributed.py cuts them; within 10 % of what XLA plans for."""
    state, train, model = program.state, program.train, program.model
    share, ways = fsdp * tensor, devices // tensor  # of parameters, of rows
    parameters = _bytes(state["params"]) + _bytes(program.frozen) + _bytes(state.get("ema"))
    gradients = sum(4 * leaf.size for leaf in jax.tree.leaves(state["params"]))
    if train.accumulation > 1:
        gradients *= 2  # of one part, and their sum
    kept, by_layer = _kept(program, train.remat), _kept(program, "none")
    rows_kept, weights_kept = kept
    tokens = math.prod(program.batch["tokens"].shape) // train.accumulation // ways
    # a block of which little is kept is computed again as a whole
    block = by_layer[0] // model.n_layer // ways
    if program.precision.attention == "recompute":  # the scores and their gradient, for the time of one layer
        block += 7 * model.n_head * program.batch["tokens"].shape[1] * tokens
    if program.precision.attention == "cudnn" and train.lora is not None and train.remat == "none":
        # its backward pass reads what attention gave, which otherwise the frozen linear behind it has no use for
        rows_kept += 2 * model.n_layer * tokens * ways * model.n_embd
    chunk = chunk_size(tokens, model.vocab_size, program.precision.compute_dtype)
    logits = 6 * chunk * model.vocab_size
    head = (
        0 if train.lora is not None else 4 * model.vocab_size * model.n_embd
    )  # its gradient, before it is cut
    return Memory(
        parameters=parameters // share,
        optimizer=(_bytes(state["optimizer"]) + _bytes(state.get("loss_scale"))) // share,
        batch=_bytes(program.batch) // ways,
        gradients=gradients // share,
        activations=rows_kept // ways + weights_kept // share,
        workspace=head + max(block, logits),
    )


def _kept(program: Program, remat: str) -> tuple[int, int]:
    """Bytes that the scan over the layers hands to the backward pass: (activations, copies of weights)."""
    program = dataclasses.replace(program, train=dataclasses.replace(program.train, remat=remat))
    gradient, arguments = loss_gradient(program)
    jaxpr = jax.make_jaxpr(gradient)(*arguments).jaxpr
    # without what no gradient needs: LoRA's frozen linears need no inputs, for example
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    forward = next(
        equation
        for equation in jaxpr.eqns
        if equation.primitive.name == "scan" and equation.params["length"] == program.model.n_layer
    )
    used = {id(v) for equation in jaxpr.eqns for v in equation.invars}
    rows, weights = 0, 0
    batch, length = arguments[2]["tokens"].shape
    for variable in forward.outvars:
        stacked = variable.aval.shape[:1] == (program.model.n_layer,)  # pyright: ignore[reportAttributeAccessIssue]
        if not stacked or id(variable) not in used:
            continue
        shape = variable.aval.shape  # pyright: ignore[reportAttributeAccessIssue]
        if batch in shape[1:] and length in shape[1:]:
            rows += _bytes(variable.aval)
        else:
            weights += _bytes(variable.aval)
    return rows, weights


def _bytes(tree: Any) -> int:
    total = 0
    for leaf in jax.tree.leaves(tree):
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        total += math.prod(leaf.shape) * (8 if key else leaf.dtype.itemsize)
    return total


def flops_per_token(
    model: GPT2Config, length: int, *, lora: LoRAConfig | None = None, remat: str = "none"
) -> float:
    """FLOPs of one training step for each token: products of matrices, two for a multiplication and an addition.

    Forward, and twice that for the two products of each in the backward pass; with LoRA the frozen weights need one
    of them. Attention is counted in full, as it is computed without a kernel that skips what the mask hides.
    """
    block = 4 * model.n_embd**2 + 2 * model.n_embd * model.mlp_dim
    weights = model.n_layer * block + model.vocab_size * model.n_embd
    attention = 2 * model.n_layer * length * model.n_embd
    forward = 2.0 * (weights + attention)
    frozen = 2.0 * weights if lora is not None else 0.0
    again = 2.0 * (model.n_layer * block + attention) if remat == "full" else 0.0
    return 3 * forward - frozen + again


def largest_batch(
    model: GPT2Config, train: FinetuneConfig, backend: str, memory: int, **mesh: int
) -> tuple[int, Memory] | None:
    """The largest batch that `memory` bytes a device hold, and what it takes; None where not even the smallest does.

    Memory grows in proportion to the rows: two estimates give the line, a third one checks its end.
    """
    ways = mesh.get("devices", 1) // mesh.get("tensor", 1)
    unit = ways * train.accumulation

    def needed(units: int) -> Memory:
        sized = dataclasses.replace(train, batch_size=units * unit)
        return estimate_memory(make_program(model, sized, backend), **mesh)

    few, more = needed(8).total, needed(16).total
    slope = (more - few) / 8
    units = max(1, int((memory - few) / slope) + 8)
    while units >= 1:
        found = needed(units)
        if found.total <= memory:
            return units * unit, found
        units = min(units - 1, int(units - (found.total - memory) / slope))
    return None


def trained_parameters(program: Program) -> int:
    """Number of scalars that the step changes."""
    return count_parameters(program.state["params"])
