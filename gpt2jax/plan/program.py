"""The training step that `finetune` would run, with shapes instead of arrays, and its compilation for a device."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt2jax.lora.adapters import cast_base, init_adapters
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params, abstract_params
from gpt2jax.ops.device import Device
from gpt2jax.ops.precision import Precision
from gpt2jax.sharding import BATCH_AXES, shardings, use_mesh
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.optimizer import make_optimizer
from gpt2jax.train.step import init_state, make_configured_step, with_dropout


@dataclasses.dataclass(frozen=True)
class Program:
    """A training step for a device: its settings and the shapes of its arguments.

    Attributes:
        state, frozen, batch: shapes of the step's arguments.
    """

    model: GPT2Config
    train: FinetuneConfig
    precision: Precision
    state: dict[str, Any]
    frozen: Params | None
    batch: dict[str, jax.ShapeDtypeStruct]


def make_program(model: GPT2Config, train: FinetuneConfig, device: Device) -> Program:
    """Build the step that `finetune` would run on a device.

    Raises:
        ValueError: the sequence is longer than the context.
    """
    length = train.sequence_length or min(model.n_positions, 1024)
    if length > model.n_positions:
        raise ValueError(
            f"sequence_length must be at most the model's context of {model.n_positions}, got {length}"
        )
    model = with_dropout(model, train)
    # neither figure changes the memory, and a run finds its own in the texts
    train = dataclasses.replace(train, steps=train.steps or 1000, learning_rate=train.learning_rate or 1e-4)
    trainable, frozen, lora = abstract_params(model), None, train.lora
    if lora is not None:
        frozen = jax.eval_shape(lambda p: cast_base(p, train.base_dtype), trainable)
        trainable = jax.eval_shape(lambda p: init_adapters(model, lora, 0, params=p), frozen)

    start = functools.partial(
        init_state,
        optimizer=_optimizer(train),
        loss_scaling=train.compute_dtype == "float16",
        ema=train.ema_decay is not None,
    )
    shape = (train.batch_size, length)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("tokens", "targets")}
    batch["loss_mask"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    precision = Precision.for_device(train.compute_dtype, device)
    return Program(model, train, precision, jax.eval_shape(start, trainable), frozen, batch)


def _optimizer(train: FinetuneConfig) -> Any:
    return make_optimizer(train, train.steps or 1000)


def compile_program(program: Program, mesh: Mesh) -> Any:
    """Compile the step for the devices of a mesh; `memory_analysis()` of the result is for one of them."""
    step = make_configured_step(program.model, program.train, _optimizer(program.train), program.precision)

    def place(tree: Any, places: Any) -> Any:
        return jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), tree, places)

    state, frozen, batch = program.state, program.frozen, program.batch
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    with use_mesh(mesh):
        return compile_for(
            program.precision.execution.platform,
            step,
            place(state, shardings(state, mesh)),
            None if frozen is None else place(frozen, shardings(frozen, mesh)),
            place(batch, dict.fromkeys(batch, rows)),
        )


def compile_for(backend: str, function: Any, *arguments: Any, **static: Any) -> Any:
    """Compile a jitted function for shapes whose shardings name the devices of "cpu", "gpu" or "tpu"."""
    platform = {"gpu": "cuda"}.get(backend, backend)
    return function.trace(*arguments, **static).lower(lowering_platforms=(platform,)).compile()


def peak_bytes(compiled: Any, backend: str) -> int:
    """Return the bytes that XLA plans on each device for a compiled program: arguments, results and temporaries.

    On a TPU that is the peak of the buffers that XLA assigns: the temporaries of `memory_analysis()` are up to two
    thirds more than those. Elsewhere that peak leaves the temporaries out, or is the same.
    """
    memory = compiled.memory_analysis()
    if backend == "tpu":
        return memory.peak_memory_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + results
