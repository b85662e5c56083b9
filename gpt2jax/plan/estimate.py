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

from gpt2jax.lora.config import LoRAConfig
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params, count_parameters
from gpt2jax.ops.attention import query_blocks, supports_memory_efficient_attention
from gpt2jax.ops.cross_entropy import chunk_size, column_slices
from gpt2jax.plan.program import Program, loss_gradient, make_program
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.unrolled import should_unroll


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
    """Bytes on each of `devices` devices, cut as distributed.py cuts them; nearly always within 10 % of XLA's plan."""
    state, train = program.state, program.train
    share, ways = fsdp * tensor, devices // tensor  # of parameters, of rows
    parameters = _bytes(state["params"]) + _bytes(program.frozen) + _bytes(state.get("ema"))
    gradients = sum(4 * leaf.size for leaf in jax.tree.leaves(state["params"]))
    if train.gradient_accumulation_steps > 1:
        gradients *= 2  # of one part, and their sum
    rows_kept, weights_kept = _kept(program, train.remat)
    rows_of_all = rows_kept  # of blocks that keep everything
    if train.remat != "none":
        # computed again, narrow activations lie beside the wide ones that they were made from
        wide = program.precision.activation_dtype != program.precision.compute_dtype
        rows_of_all, _ = _kept(program, "none", wide=wide)
    rows_of_block = rows_of_all // program.model.n_layer // ways
    length = program.batch["tokens"].shape[1]
    if should_unroll(program.model, train, length, program.backend, devices):
        rows_kept = int(rows_kept * _kept_beside_gradients(program, rows_kept))
    tokens = math.prod(program.batch["tokens"].shape) // train.gradient_accumulation_steps // ways
    return Memory(
        parameters=parameters // share,
        optimizer=(_bytes(state["optimizer"]) + _bytes(state.get("loss_scale"))) // share,
        batch=_bytes(program.batch) // ways,
        gradients=gradients // share,
        activations=rows_kept // ways + weights_kept // share,
        workspace=_copied_kernels(program, share)
        + _workspace(program, rows_of_block, tokens, share, devices),
    )


def _workspace(program: Program, rows_of_block: int, tokens: int, share: int, devices: int) -> int:
    """Bytes of the loss or of a block, whichever is more, and of this device's part of the head's gradient.

    The loss and its gradient are computed before the first block's backward pass begins.
    """
    head = program.model.vocab_size * program.model.n_embd
    part = 4 * head if devices > 1 and program.train.lora is None else 0
    loss = _loss_workspace(program, tokens, share)
    block = _block_workspace(program, rows_of_block, tokens, share)
    if program.backend == "tpu" and share > 1:  # the parts are added after the backward pass
        return part + max(loss, block)
    return max(part + loss, block)


def _kept_beside_gradients(program: Program, kept: int) -> float:
    """Which part of what the forward pass keeps lies beside the gradients, where no loop goes over the layers.

    In the backward pass each layer's gradients then come where what it kept has gone: the more the gradients outweigh
    that, the less of it is there at the same time. The line is fitted to compiled programs.
    """
    gradients = 4 * sum(leaf.size for leaf in jax.tree.leaves(program.state["params"]["h"]))
    return min(1.0, max(0.0, kept / gradients - 0.3))


def _copied_kernels(program: Program, share: int) -> int:
    """Bytes of what an accelerator's loops over the layers read in place of the blocks' kernels."""
    blocks, dtype = _base(program)["h"], program.precision.compute_dtype
    if (
        program.backend == "tpu" and dtype.itemsize == 2
    ):  # made narrow for all layers at once, ahead of the loop
        sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(blocks) if leaf.dtype == jnp.float32]
        return 2 * sum(sizes) // share
    if program.backend != "cpu" and share > 1:  # cut along its last axis, which comes first to be gathered
        return sum(_bytes(blocks[module]["c_proj"]["kernel"]) for module in ("attn", "mlp")) // share
    return 0


def _loss_workspace(program: Program, tokens: int, share: int) -> int:
    """Bytes for copies of the head, which is whole on every device, and logits (losses.py)."""
    model, size = program.model, program.precision.compute_dtype.itemsize
    head = model.vocab_size * model.n_embd
    copy = size * head if size < 4 or share > 1 else 0
    # and once more: a CPU gathers in float32 and turns that around, a TPU has float32 in two layouts
    again = {"gpu": 0, "cpu": 4 * (share > 1), "tpu": 4 * (size == 4)}[program.backend] * head
    chunk = chunk_size(tokens, model.vocab_size)
    width, _, _ = column_slices(model.vocab_size)
    # a TPU computes them in its cores' own memory
    logits = 0 if program.backend == "tpu" else 4 * chunk * model.vocab_size
    slices = size * chunk * width + 8 * width * model.n_embd
    if again and size == 4 and program.backend == "cpu":
        # what was gathered makes room: for slices, and for all logits where no loop over chunks holds it
        return copy + (max(again, logits) if chunk == tokens else again + logits)
    return copy + again + logits + slices


def _block_workspace(program: Program, block: int, tokens: int, share: int) -> int:
    """Bytes for a block's backward pass, whose forward pass (`block`) is computed again or read off what was kept."""
    model, precision, lora = program.model, program.precision, program.train.lora
    # float32 of the mlp's width: what an adapter adds, and but on a TPU the product that it is added to and the
    # activations' gradient
    mlp = 4 if lora is not None and "mlp.c_fc" in lora.targets else 0
    if program.backend != "tpu":
        mlp += 4 + precision.activation_dtype.itemsize
    scores = 0
    if _lean(program, "recompute"):
        # of probabilities, their gradient and the scores' gradient, float32, those that XLA holds at once
        held = 2 if program.backend == "cpu" else 1
        length = program.batch["tokens"].shape[1]
        pairs = sum((end - begin) * end for begin, end in query_blocks(length))
        scores = held * 4 * model.n_head * pairs * (tokens // length)
    weights = 0
    if share > 1:  # a layer's, whole, and without LoRA their gradient before it is cut
        weights = _bytes(_base(program)["h"]) // model.n_layer * (1 if lora else 2)
    return block + mlp * tokens * model.mlp_dim + scores + weights


def _lean(program: Program, kind: str) -> bool:
    """Whether attention is computed in this way (attention.py) and not with scores that are kept."""
    drops = program.model.attn_pdrop > 0
    return program.precision.attention == kind and supports_memory_efficient_attention(
        kind, program.model.head_dim, drops=drops
    )


def _base(program: Program) -> Params:
    """The model's parameters, trained or frozen."""
    return program.state["params"] if program.frozen is None else program.frozen


def _kept(program: Program, remat: str, *, wide: bool = False) -> tuple[int, int]:
    """Bytes that the scan over the layers hands to the backward pass: (activations, copies of weights).

    Args:
        remat: in place of the program's own.
        wide: count the float32 values that narrow activations were made from as well.
    """
    model = program.model
    program = dataclasses.replace(program, train=dataclasses.replace(program.train, remat=remat))
    gradient, arguments = loss_gradient(program)
    jaxpr = jax.make_jaxpr(gradient)(*arguments).jaxpr
    # without what no gradient needs: LoRA's frozen linears need no inputs, for example
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    forward = next(
        equation
        for equation in jaxpr.eqns
        if equation.primitive.name == "scan" and equation.params["length"] == model.n_layer
    )
    used = {id(v) for equation in jaxpr.eqns for v in equation.invars}
    rows, weights = 0, 0
    batch, length = arguments[2]["tokens"].shape
    for variable in forward.outvars:
        aval: Any = variable.aval
        if aval.shape[:1] != (model.n_layer,) or id(variable) not in used:
            continue
        if batch in aval.shape[1:] and length in aval.shape[1:]:
            rows += _bytes(aval) + (4 * aval.size if wide and aval.dtype.itemsize == 2 else 0)
        else:
            weights += _bytes(aval)
    if _lean(program, "cudnn"):
        # it is traced as attention in XLA, and differs from that in what it gives, [B, T, D]: the backward pass reads
        # it once more, and to the policy "dots" it is no product (float32)
        given = model.n_layer * batch * length * model.n_embd
        rows += {"none": 2 * given, "dots": -4 * given}.get(remat, 0)
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
    unit = ways * train.gradient_accumulation_steps

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
