"""Compile training steps and decoding loops for GPUs and TPUs that need not be here; show memory and kernels.

    python benchmarks/accelerators.py                 all cases
    python benchmarks/accelerators.py --only gpt2-xl  those whose name holds that
    python benchmarks/accelerators.py --decoding      decoding loops instead of training steps

Needs jax's plugins (`pip install -e ".[cuda]"`, `".[tpu]"`), not their devices. Nothing is run and nothing timed:
"estimate" and "compiled" are the figures of `gpt2jax plan`: a rough estimate, and the peak that XLA plans for the
compiled program. "ratio" is the second over the first. For a decoding loop the table names the largest array that a
step copies or converts, beside its smallest weight and its cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from gpt2jax.generation.cached_model import decoding_precision, prepare_decoding_params, weight_dtype
from gpt2jax.generation.decoding import DecoderSpec, initial_state, make_decode_params
from gpt2jax.generation.kv_cache import init_cache
from gpt2jax.generation.requests import PromptState
from gpt2jax.generation.strategy import Sampling, decode
from gpt2jax.lora.config import LoRAConfig
from gpt2jax.model.config import PRESETS
from gpt2jax.model.gpt2 import init_params
from gpt2jax.plan.devices import find_device, topology_devices
from gpt2jax.plan.estimate import estimate_memory
from gpt2jax.plan.program import compile_for, compile_program, make_program, peak_bytes
from gpt2jax.sharding import make_mesh
from gpt2jax.train.config import FinetuneConfig


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step: model, device, number of devices, rows of 1,024 tokens, and settings other than the defaults."""

    model: str
    device: str
    devices: int
    rows: int
    settings: dict = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return the name that the table shows."""
        settings = [f"{k}={v}" if not isinstance(v, LoRAConfig) else "lora" for k, v in self.settings.items()]
        return " ".join([self.model, f"B={self.rows}", *settings])


CASES = (
    Case("gpt2", "h100", 1, 16),
    Case("gpt2", "h100", 1, 64),
    Case("gpt2", "h100", 1, 16, {"dropout": 0.1}),
    Case("gpt2", "h100", 1, 16, {"compute_dtype": "float32"}),
    Case("gpt2", "h100", 1, 16, {"lora": LoRAConfig()}),
    Case("gpt2-medium", "h100", 1, 16),
    Case("gpt2-medium", "h100", 1, 16, {"lora": LoRAConfig()}),
    Case("gpt2-large", "h100", 1, 8),
    Case("gpt2-xl", "h100", 1, 8),
    Case("gpt2-xl", "h100", 1, 32, {"remat": "full"}),
    Case("gpt2", "v5e", 1, 4),
    Case("gpt2", "v5e", 8, 64),
    Case("gpt2-xl", "v5e", 8, 64, {"fsdp": 8, "remat": "full"}),
    Case(
        "gpt2-xl",
        "v5e",
        8,
        64,
        {"fsdp": 4, "tensor_parallel": 2, "remat": "full", "gradient_accumulation_steps": 4},
    ),
)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A decoding loop: model, device, rows, slots of the cache, dtype of the weights."""

    model: str
    device: str
    rows: int
    slots: int = 1024
    dtype: str = "bfloat16"
    devices: int = 1

    @property
    def name(self) -> str:
        """Return the name that the table shows."""
        return f"{self.model} B={self.rows} S={self.slots} {self.dtype}"


DECODING = (
    Decoding("gpt2", "h100", 1),
    Decoding("gpt2", "h100", 32),
    Decoding("gpt2", "h100", 1, dtype="float32"),
    Decoding("gpt2", "h100", 1, dtype="int8"),
    Decoding("gpt2-xl", "h100", 1),
    Decoding("gpt2-xl", "h100", 32),
    Decoding("gpt2", "v5e", 1),
    Decoding("gpt2-xl", "v5e", 8),
)


def main() -> None:
    """Compile the cases one after the other and print a table of those that could be compiled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--decoding", action="store_true", help="decoding loops instead of training steps")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    console = Console(width=150)
    columns = ("step", "devices", "estimate GB", "compiled GB", "ratio", "arguments GB", "cuDNN attention")
    cases: tuple[Any, ...] = CASES
    measure: Callable[[Any], tuple[str, ...]] = measure_training
    if options.decoding:
        columns = (
            "loop",
            "device",
            "compiled GB",
            "arguments GB",
            "temporaries MB",
            "cache MB",
            "cache in place",
        )
        columns += ("largest copy", "largest conversion", "smallest weight")
        cases, measure = DECODING, measure_decoding
    table = Table(*columns, title=f"one device's memory, T=1024, jax {jax.__version__}")
    for case in cases:
        if options.only in case.name:
            try:
                with console.status(f"{case.name} on {case.devices} x {case.device}"):
                    table.add_row(*measure(case))
            except LookupError as error:
                console.print(f"left out: {case.name}: {error}", highlight=False)
    console.print(table)


def measure_training(case: Case) -> tuple[str, ...]:
    """Return a row of the table of training steps."""
    device = find_device(case.device)
    train = FinetuneConfig(
        batch_size=case.rows,
        sequence_length=1024,
        **{"compute_dtype": "bfloat16", "dropout": 0.0} | case.settings,
    )
    program = make_program(PRESETS[case.model], train, device.backend)
    mesh = make_mesh(
        fsdp=train.fsdp, tensor=train.tensor_parallel, devices=topology_devices(device, case.devices)
    )
    estimate = estimate_memory(
        program, fsdp=train.fsdp, tensor=train.tensor_parallel, devices=case.devices
    ).total
    compiled = compile_program(program, mesh)
    memory, total = compiled.memory_analysis(), peak_bytes(compiled, device.backend)
    kernels = compiled.as_text().count('custom_call_target="__cudnn$fmha')
    return (
        case.name,
        f"{case.devices} x {case.device}",
        f"{estimate / 1e9:.2f}",
        f"{total / 1e9:.2f}",
        f"{total / estimate:.2f}",
        f"{memory.argument_size_in_bytes / 1e9:.2f}",
        str(kernels) if device.backend == "gpu" else "",
    )


def measure_decoding(case: Decoding) -> tuple[str, ...]:
    """Return a row of the table of decoding loops."""
    device = find_device(case.device)
    [place] = topology_devices(device, 1)
    here = jax.sharding.SingleDeviceSharding(place)
    config = PRESETS[case.model]
    numbers = decoding_precision(case.dtype, backend=device.backend)
    weights = weight_dtype(case.dtype, numbers)
    params = jax.eval_shape(lambda: prepare_decoding_params(init_params(config), config, dtype=weights))
    cache = jax.eval_shape(lambda: init_cache(config, case.rows, case.slots, numbers.activation_dtype))
    rows = [PromptState("", [0], case.slots - 1)] * case.rows
    limits, padding = [row.limit for row in rows], np.zeros(case.rows, np.int32)
    settings = make_decode_params(rows, padding, limits, 1, stop_ids=[config.eos_token_id or 0])
    state = initial_state(np.zeros((case.rows, case.slots), np.int32), settings.limits, 1)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=here),
        (params, cache, state, settings, np.int32(case.slots)),
    )
    compiled = compile_for(device.backend, decode, Sampling(), DecoderSpec(config, numbers), *arguments)
    memory, total = compiled.memory_analysis(), peak_bytes(compiled, device.backend)
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    smallest = min(leaf.size for layer in params["h"] for leaf in jax.tree.leaves(layer) if leaf.ndim == 2)
    text = compiled.as_text()
    return (
        case.name,
        case.device,
        f"{total / 1e9:.2f}",
        f"{memory.argument_size_in_bytes / 1e9:.2f}",
        f"{memory.temp_size_in_bytes / 1e6:.1f}",
        f"{nbytes / 1e6:.1f}",
        "yes" if memory.alias_size_in_bytes >= nbytes else "no",
        f"{largest(text, 'copy'):,}",
        f"{largest(text, 'convert'):,}",
        f"{smallest:,}",
    )


def largest(text: str, operation: str) -> int:
    """Return the size of the largest array that an instruction of this operation makes in a compiled program."""
    sizes = [
        math.prod(int(dim) for dim in dims.split(","))
        for dims in re.findall(rf"= \w+\[([\d,]+)\]\S* {operation}\(", text)
    ]
    return max(sizes, default=0)


if __name__ == "__main__":
    main()
