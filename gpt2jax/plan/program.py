"""The training step of a plan, with shapes in place of arrays: traced for an estimate, or compiled for a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt2jax.lora.adapters import cast_base, init_adapters
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params, abstract_params, hidden_states, lm_head_weight
from gpt2jax.ops.cross_entropy import cross_entropy
from gpt2jax.ops.precision import Precision
from gpt2jax.sharding import BATCH_AXES, shardings, use_mesh
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.optimizer import make_optimizer, resolve_learning_rate
from gpt2jax.train.step import init_state, make_configured_step
from gpt2jax.train.unrolled import should_unroll, unstack_layers


@dataclasses.dataclass(frozen=True)
class Program:
    """A training step's settings, and the shapes that go in.

    Attributes:
        backend: that it is for: "cpu", "gpu" or "tpu".
        state, frozen, batch: shapes of the step's arguments.
    """

    model: GPT2Config
    train: FinetuneConfig
    backend: str
    precision: Precision
    state: Any
    frozen: Params | None
    batch: dict[str, jax.ShapeDtypeStruct]


def make_program(model: GPT2Config, train: FinetuneConfig, backend: str) -> Program:
    """The step that `finetune` would run on `backend`, its dropout rates in `model`.

    Raises:
        ValueError: the sequence is longer than the context.
    """
    length = train.sequence_length or min(model.n_positions, 1024)
    if length > model.n_positions:
        raise ValueError(
            f"sequence_length={length} is over the model's context of {model.n_positions} tokens"
        )
    params = abstract_params(model)
    train = resolve_learning_rate(dataclasses.replace(train, steps=train.steps or 1000), 10**9)
    trainable, frozen = params, None
    if train.lora is not None:
        lora = train.lora
        frozen = jax.eval_shape(lambda p: cast_base(p, train.base_dtype), params)
        trainable = jax.eval_shape(lambda p: init_adapters(model, lora, 0, params=p), frozen)
    optimizer = make_optimizer(train, train.steps or 1000)

    def start(trainable):
        scaling, ema = train.compute_dtype == "float16", train.ema_decay is not None
        return init_state(trainable, optimizer, loss_scaling=scaling, ema=ema)

    state = jax.eval_shape(start, trainable)
    shape = (train.batch_size, length)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("tokens", "targets")}
    batch["loss_mask"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    precision = Precision.for_backend(train.compute_dtype, backend=backend)
    return Program(model, train, backend, precision, state, frozen, batch)


def loss_gradient(program: Program) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The gradient of one part of the batch, to be traced, and the shapes of its arguments."""
    model, train, lora, precision = program.model, program.train, program.train.lora, program.precision
    if (
        precision.attention == "cudnn"
    ):  # which can't be traced off a GPU; this keeps the same but for [B, N, T] sums
        precision = dataclasses.replace(precision, attention="recompute")
    rows = train.batch_size // train.gradient_accumulation_steps
    batch = {name: jax.ShapeDtypeStruct((rows, s.shape[1]), s.dtype) for name, s in program.batch.items()}
    drops = max(model.embd_pdrop, model.attn_pdrop, model.resid_pdrop, lora.dropout if lora else 0.0) > 0

    def loss(trainable, frozen, batch):
        params, adapters = (trainable, None) if lora is None else (frozen, trainable)
        hidden = hidden_states(
            params,
            model,
            batch["tokens"],
            precision=precision,
            dropout_key=jax.random.key(0) if drops else None,
            adapters=adapters,
            lora_scale=lora.scales(model.n_layer) if lora else 1.0,
            lora_dropout=lora.dropout if lora else 0.0,
            remat=train.remat,
        )
        return cross_entropy(hidden, lm_head_weight(params), batch["targets"], batch["loss_mask"], precision)[
            0
        ]

    return jax.grad(loss), (program.state["params"], program.frozen, batch)


def compile_program(program: Program, mesh: Mesh) -> Any:
    """The step, compiled by XLA for the devices of `mesh`; its `memory_analysis()` is for one of them."""
    train = program.train
    optimizer = make_optimizer(train, train.steps or 1000)
    step = make_configured_step(program.model, train, optimizer, program.precision)

    def placed(tree, cuts):
        return jax.tree.map(lambda s, cut: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=cut), tree, cuts)

    rows, state = NamedSharding(mesh, PartitionSpec(BATCH_AXES)), program.state
    if should_unroll(program.model, train, program.batch["tokens"].shape[1], program.backend, mesh.size):
        state = jax.eval_shape(unstack_layers, state)
    arguments = (
        placed(state, shardings(state, mesh)),
        None if program.frozen is None else placed(program.frozen, shardings(program.frozen, mesh)),
        placed(program.batch, {name: rows for name in program.batch}),
    )
    with use_mesh(mesh):
        return compile_for(program.backend, step, *arguments)


def compile_for(backend: str, function: Any, *arguments: Any, **static: Any) -> Any:
    """A jitted function, compiled for shapes whose shardings name the devices of `backend`: "cpu", "gpu" or "tpu"."""
    platform = {"gpu": "cuda"}.get(backend, backend)
    return function.trace(*arguments, **static).lower(lowering_platforms=(platform,)).compile()


def planned_bytes(compiled: Any, backend: str) -> int:
    """Bytes that XLA plans on each device for a compiled program: its arguments, results and what it needs meanwhile.

    On a TPU it is the peak of the buffers that XLA assigns: what `memory_analysis()` calls temporaries is up to two
    thirds more than those. Elsewhere that peak leaves the temporaries out, or says the same.
    """
    memory = compiled.memory_analysis()
    if backend == "tpu":
        return memory.peak_memory_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + results
