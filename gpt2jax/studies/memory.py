"""The memory of a training: what the device used, and what XLA plans for the step."""

from __future__ import annotations

import functools

import jax

from gpt2jax.model.config import GPT2Config
from gpt2jax.ops.device import Device
from gpt2jax.plan.program import compile_program, make_program, peak_bytes
from gpt2jax.sharding import make_mesh
from gpt2jax.train.config import FinetuneConfig


def used_bytes() -> int:
    """Return the most bytes that this process ever used of one of its devices; 0 if the device does not count."""
    stats = (device.memory_stats() or {} for device in jax.local_devices())
    return max(each.get("peak_bytes_in_use", 0) for each in stats)


@functools.cache
def planned_bytes(model: GPT2Config, training: FinetuneConfig) -> int:
    """Return the bytes that XLA plans on each device for the training step: arguments, results and temporaries."""
    program = make_program(model, training, Device.of())
    mesh = make_mesh(fsdp=training.fsdp, tensor=training.tensor_parallel)
    return peak_bytes(compile_program(program, mesh), jax.default_backend())
