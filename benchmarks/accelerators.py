"""Compile gpt2jax's programs for GPUs and TPUs that need not be here; show what they must cost, and their memory.

    python benchmarks/accelerators.py                     all programs for an H100
    python benchmarks/accelerators.py --device t4 --only "gpt2 lora"
    python benchmarks/accelerators.py --memory            memory beside the estimate of `gpt2jax plan`, TPU slices too

Needs jax's plugins (`pip install -e ".[cuda]"`, `".[tpu]"`), not their devices. Nothing is run and nothing timed: the
figures are bounds that roofline.py reads from the compiled program. "ms" is kernels + launches; the figures of a loop
over new tokens are those of one token. "estimate" and "compiled" are those of `gpt2jax plan`, "ratio" the second over
the first.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from roofline import lines_of, read_roofline

from gpt2jax.evaluation import scoring
from gpt2jax.generation.cached_model import prepare_decoding_params, weight_dtype
from gpt2jax.generation.config import GenerationConfig
from gpt2jax.generation.decoding import DecoderSpec, initial_state, make_decode_params
from gpt2jax.generation.kv_cache import init_cache
from gpt2jax.generation.prefill import prefill_empty
from gpt2jax.generation.requests import PromptState
from gpt2jax.generation.stages import make_stages
from gpt2jax.generation.strategy import Sampling, decode
from gpt2jax.lora.config import LoRAConfig
from gpt2jax.model.config import PRESETS
from gpt2jax.model.gpt2 import abstract_params, init_params
from gpt2jax.ops.precision import Precision
from gpt2jax.plan.devices import DEVICES, Accelerator, find_device, topology_devices
from gpt2jax.plan.estimate import estimate_memory
from gpt2jax.plan.program import Program, compile_for, compile_program, make_program, peak_bytes
from gpt2jax.sharding import make_mesh
from gpt2jax.train.config import FinetuneConfig

NO_DROPOUT = {"compute_dtype": "bfloat16", "dropout": 0.0}


@dataclasses.dataclass(frozen=True)
class Case:
    """A program for one device: what it does, rows, tokens of a row (of decoding: slots of the cache), settings."""

    kind: str
    model: str
    rows: int
    length: int
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """What the table calls it."""
        dropout = self.settings.get("dropout")
        return f"{self.model} {self.kind} {self.rows} x {self.length} {self.dtype}" + (
            f", dropout {dropout:g}" if dropout else ""
        )


SMALL_LORA = LoRAConfig(8, 16.0, targets=("attn.c_attn",))  # PEFT's defaults


def cases_of(model: str) -> tuple[Case, ...]:
    """Return the programs that a user of the model waits for."""
    rows = 8 if model == "gpt2-xl" else 16
    lora = {"lora": SMALL_LORA}
    return (
        Case("train", model, rows, 1024),
        Case("train", model, rows, 1024, {"dropout": 0.1}),
        Case("train", model, 32, 128, dtype="float16"),
        Case("lora", model, rows, 1024, lora),
        Case("lora", model, 32, 128, lora, "float16"),
        Case("evaluate", model, 32, 128),
        Case("decode", model, 1, 256),
        Case("decode", model, 32, 256),
        Case("prefill", model, 1, 256),
        Case("prefill", model, 32, 1024),
    )


CASES = tuple(case for model in ("gpt2", "gpt2-medium", "gpt2-xl") for case in cases_of(model))


@dataclasses.dataclass(frozen=True)
class MemoryCase:
    """A training step: model, device, number of devices, rows of 1,024 tokens, and settings other than the defaults."""

    model: str
    device: str
    devices: int
    rows: int
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return the name that the table shows."""
        settings = [f"{k}={v}" if not isinstance(v, LoRAConfig) else "lora" for k, v in self.settings.items()]
        return " ".join([self.model, f"B={self.rows}", *settings])


MEMORY_CASES = (
    MemoryCase("gpt2", "h100", 1, 16),
    MemoryCase("gpt2", "h100", 1, 64),
    MemoryCase("gpt2", "h100", 1, 16, {"dropout": 0.1}),
    MemoryCase("gpt2", "h100", 1, 16, {"compute_dtype": "float32"}),
    MemoryCase("gpt2", "h100", 1, 16, {"lora": SMALL_LORA}),
    MemoryCase("gpt2-medium", "h100", 1, 16),
    MemoryCase("gpt2-medium", "h100", 1, 16, {"lora": SMALL_LORA}),
    MemoryCase("gpt2-large", "h100", 1, 8),
    MemoryCase("gpt2-xl", "h100", 1, 8),
    MemoryCase("gpt2-xl", "h100", 1, 32, {"remat": "full"}),
    MemoryCase("gpt2", "v5e", 1, 4),
    MemoryCase("gpt2", "v5e", 8, 64),
    MemoryCase("gpt2-xl", "v5e", 8, 64, {"fsdp": 8, "remat": "full"}),
    MemoryCase(
        "gpt2-xl",
        "v5e",
        8,
        64,
        {"fsdp": 4, "tensor_parallel": 2, "remat": "full", "gradient_accumulation_steps": 4},
    ),
)


def main() -> None:
    """Compile the cases one after the other and print a table of those that could be compiled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="h100", choices=DEVICES)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--top", type=int, default=0, help="show so many of the dearest kernels of each")
    parser.add_argument("--memory", action="store_true", help="memory of training steps beside the estimate")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    console = Console(width=150)
    columns = (
        "program",
        "kernels",
        "GB",
        "TFLOP",
        "ms",
        "waits",
        "temporaries GB",
        "of the peak",
        "cuDNN attention",
    )
    cases: tuple[Any, ...] = CASES
    measure: Callable[[Any], tuple[str, ...]] = lambda case: measure_cost(case, options, console)  # noqa: E731
    if options.memory:
        columns = (
            "step",
            "devices",
            "estimate GB",
            "compiled GB",
            "ratio",
            "arguments GB",
            "cuDNN attention",
        )
        cases, measure = MEMORY_CASES, measure_memory
    where = "one device's memory, T=1024" if options.memory else find_device(options.device).title
    table = Table(*columns, title=f"{where}, jax {jax.__version__}")
    for case in cases:
        if options.only in case.name:
            try:
                with console.status(case.name):
                    table.add_row(*measure(case))
            except LookupError as error:
                console.print(
                    f"left out: {case.name}: {error}", highlight=False, markup=False, soft_wrap=True
                )
                if not options.memory:  # all of them need the same plugin
                    return
    console.print(table)


# ---- cost ----


def measure_cost(case: Case, options: argparse.Namespace, console: Console) -> tuple[str, ...]:
    """Return a row of the table of costs."""
    device = find_device(options.device)
    compile_case = {"evaluate": compile_evaluation, "decode": compile_decoding, "prefill": compile_decoding}
    compiled = compile_case.get(case.kind, compile_training)(case, device)
    text = compiled.as_text()
    found = read_roofline(text, device, case.dtype)
    if options.top:
        console.print(case.name, *lines_of(found, options.top), sep="\n", highlight=False, markup=False)
    total = found.total
    return (
        case.name,
        f"{total.kernels:,}",
        f"{total.bytes / 1e9:.2f}",
        f"{total.flops / 1e12:.3f}",
        f"{total.seconds * 1e3:.2f} + {found.launch_seconds * 1e3:.2f}",
        str(found.waits),
        f"{compiled.memory_analysis().temp_size_in_bytes / 1e9:.2f}",
        f"{found.utilisation:.2f}",
        str(count_cudnn_attention(text)),
    )


def count_cudnn_attention(text: str) -> int:
    """Return the calls of cuDNN's attention in a program."""
    return text.count('custom_call_target="__cudnn$fmha')


def training_program(
    model: str, rows: int, length: int, settings: dict[str, Any], device: Accelerator
) -> Program:
    """Return the step of a run with these settings."""
    train = FinetuneConfig(batch_size=rows, sequence_length=length, **{**NO_DROPOUT, **settings})
    return make_program(PRESETS[model], train, device.facts)


def compile_training(case: Case, device: Accelerator) -> Any:
    """Compile a training step, of all parameters or of adapters."""
    settings = {"compute_dtype": case.dtype, **case.settings}
    program = training_program(case.model, case.rows, case.length, settings, device)
    return compile_program(program, make_mesh(devices=topology_devices(device, 1)))


def place(tree: Any, device: Any) -> Any:
    """Return the shapes of a tree on one device."""
    here = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=here), tree)


def compile_evaluation(case: Case, device: Accelerator) -> Any:
    """Compile the scoring of a batch."""
    [chip] = topology_devices(device, 1)
    config = PRESETS[case.model]
    precision = Precision.for_device(case.dtype, device.facts)
    params = jax.eval_shape(lambda p: scoring._scoring_params(p, precision), abstract_params(config))
    ids = jax.ShapeDtypeStruct((1, case.rows, case.length), np.int32)
    arguments = place((params, ids, ids), chip)
    return compile_for(device.backend, scoring._token_scores, *arguments, config=config, precision=precision)


def compile_decoding(case: Case, device: Accelerator) -> Any:
    """Compile the loop over new tokens with the default sampling, or the run over a prompt."""
    [chip] = topology_devices(device, 1)
    config = PRESETS[case.model]
    precision = Precision.for_device(case.dtype, device.facts)
    weights = weight_dtype(case.dtype, precision)
    params = jax.eval_shape(lambda: prepare_decoding_params(init_params(config), config, dtype=weights))
    cache = jax.eval_shape(lambda: init_cache(config, case.rows, case.length, precision.activation_dtype))
    stages = make_stages([GenerationConfig()], has_bad_words=False, vocab_size=config.vocab_size)
    spec, padding = DecoderSpec(config, precision, stages=stages), np.zeros(case.rows, np.int32)
    if case.kind == "prefill":
        ids = np.zeros((case.rows, case.length), np.int32)
        arguments = place((params, ids, cache, padding), chip)
        return compile_for(device.backend, prefill_empty, spec.without_sampling, *arguments)
    rows = [PromptState("", [0], case.length - 1)] * case.rows
    limits = [row.limit for row in rows]
    settings = make_decode_params(rows, padding, limits, 1, stop_ids=[config.eos_token_id or 0])
    state = initial_state(np.zeros((case.rows, case.length), np.int32), settings.limits, 1)
    arguments = place((params, cache, state, settings, np.int32(case.length)), chip)
    return compile_for(device.backend, decode, Sampling(), spec, *arguments)


# ---- memory ----


def measure_memory(case: MemoryCase) -> tuple[str, ...]:
    """Return a row of the table of memory."""
    device = find_device(case.device)
    program = training_program(case.model, case.rows, 1024, case.settings, device)
    fsdp, tensor = program.train.fsdp, program.train.tensor_parallel
    mesh = make_mesh(fsdp=fsdp, tensor=tensor, devices=topology_devices(device, case.devices))
    estimate = estimate_memory(program, fsdp=fsdp, tensor=tensor, devices=case.devices).total
    compiled = compile_program(program, mesh)
    total = peak_bytes(compiled, device.backend)
    return (
        case.name,
        f"{case.devices} x {case.device}",
        f"{estimate / 1e9:.2f}",
        f"{total / 1e9:.2f}",
        f"{total / estimate:.2f}",
        f"{compiled.memory_analysis().argument_size_in_bytes / 1e9:.2f}",
        str(count_cudnn_attention(compiled.as_text())) if device.backend == "gpu" else "",
    )


if __name__ == "__main__":
    main()
