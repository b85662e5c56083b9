"""`gpt2jax plan`: memory and FLOPs of a training run on a device, which need not be here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gpt2jax.cli.common import print_line, run_command
from gpt2jax.cli.finetune import AdapterOptions, imply_lora
from gpt2jax.utils.validation import in_range, must_be, positive_int, validated

if TYPE_CHECKING:
    from gpt2jax.model.config import GPT2Config
    from gpt2jax.plan.devices import Accelerator
    from gpt2jax.plan.program import Program
    from gpt2jax.train.config import FinetuneConfig


@validated
@dataclasses.dataclass(frozen=True)
class Options:
    """Show the memory, FLOPs and tokens per second of a training run on a device, and the largest batch.

    The options of the run are those of `gpt2jax finetune`, which explains them.

    $ gpt2jax plan --model gpt2-xl --device h100 --lora
    $ gpt2jax plan --model gpt2 --device t4 --compute-dtype float16 --sequence-length 128 --batch-size 32

    Attributes:
        model: gpt2-mini, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a hub id, or a path.
        device: t4, v100, a100, a100-40, l4, rtx4090, h100, h200, v5e, v6e.
        devices: number of devices.
        batch_size: rows of one optimizer step, over all devices.
        gradient_accumulation_steps: parts of a batch that are computed one after the other.
        sequence_length: tokens of one row. Default: the model's context, at most 1024.
        compute_dtype: operands of matrix products.
        optimizer: adamw, adafactor, lion, muon or sgd.
        moments_dtype: of the optimizer's moments.
        remat: what the backward pass computes again: none, dots, weights or full.
        dropout: of the model in training.
        attention_dropout: of the attention's probabilities; cuDNN's attention needs 0. Default: as --dropout.
        lora: train low-rank adapters instead of all parameters. Any --lora.* option implies it.
        lora_settings: settings of the adapters.
        base_dtype: of the frozen parameters under adapters. Default: float32.
        fsdp: devices that share one copy of parameters and moments.
        tensor_parallel: devices that share the work of one row.
        utilisation: fraction of the device's peak FLOP/s that the tokens per second assume.
        compile: let XLA compile the step for the device, if jax's plugin for it is installed.
    """

    model: str = "gpt2"
    device: str = "h100"
    devices: Annotated[int, positive_int] = 1
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    sequence_length: int | None = None
    compute_dtype: Literal["float32", "tensorfloat32", "bfloat16", "float16"] = "bfloat16"
    optimizer: str = "adamw"
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: str = "none"
    dropout: float = 0.0
    attention_dropout: float | None = None
    lora: bool = False
    lora_settings: Annotated[AdapterOptions, tyro.conf.arg(name="lora")] = AdapterOptions()
    base_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    fsdp: int = 1
    tensor_parallel: int = 1
    utilisation: Annotated[float, in_range(0, 1, open_start=True)] = 0.4
    compile: bool = True


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    run_command("plan", Options, run, imply_lora("plan", argv), prefixes=True)


def run(options: Options) -> None:
    """Print the estimate, and XLA's own figure if the step can be compiled for the device."""
    import jax
    from rich.console import Console

    from gpt2jax.plan.devices import find_device
    from gpt2jax.plan.program import make_program

    device = find_device(options.device)
    # nothing is computed here: a plugin that is only to compile must not look for its device
    jax.config.update("jax_platforms", "cpu")
    model, train = _settings(options)
    _check_mesh(train, options.devices)
    program = make_program(model, train, device.facts)
    console = Console()
    _print_estimate(options, device, program, console)
    if options.compile:
        _print_compiled(options, device, program, console)


def _settings(options: Options) -> tuple[GPT2Config, FinetuneConfig]:
    from gpt2jax.loading import load
    from gpt2jax.model.config import PRESETS
    from gpt2jax.train.config import FinetuneConfig

    model = PRESETS[options.model] if options.model in PRESETS else load(options.model).config
    names = {field.name for field in dataclasses.fields(FinetuneConfig)}
    settings: dict[str, Any] = {name: value for name, value in vars(options).items() if name in names}
    settings["lora"] = options.lora_settings.config() if options.lora else None
    return model, FinetuneConfig(**settings)


def _check_mesh(train: FinetuneConfig, devices: int) -> None:
    """Raise ValueError if the mesh does not divide the devices, or the devices the rows."""
    model_shards = train.fsdp * train.tensor_parallel
    if devices % model_shards:
        legal = f"a multiple of fsdp={train.fsdp} times tensor_parallel={train.tensor_parallel}"
        raise ValueError(must_be("devices", legal, devices))
    rows = devices // train.tensor_parallel * train.gradient_accumulation_steps
    if train.batch_size % rows:
        raise ValueError(must_be("batch_size", f"a multiple of {rows} on these devices", train.batch_size))


def _print_estimate(options: Options, device: Accelerator, program: Program, console: Any) -> None:
    from rich.table import Table

    from gpt2jax.model.gpt2 import count_parameters
    from gpt2jax.plan.estimate import estimate_memory, flops_per_token, largest_batch

    model, train = program.model, program.train
    mesh = {"fsdp": train.fsdp, "tensor": train.tensor_parallel, "devices": options.devices}
    memory = estimate_memory(program, **mesh)
    batch, length = program.batch["tokens"].shape
    table = Table("memory on each device", "GB")
    for name, size in dataclasses.asdict(memory).items():
        table.add_row(name, f"{size / 1e9:.2f}")
    table.add_section()
    table.add_row("estimate", f"[bold]{memory.total / 1e9:.2f}[/]")
    table.add_row("the device has", f"{device.memory / 1e9:.0f}")
    where = f"on {options.devices} x {device.title}, {batch:,} x {length:,} tokens a step"
    print_line(console, options.model, where)
    console.print(table)
    each = flops_per_token(model, length, lora=train.lora, remat=train.remat)
    rate = options.utilisation * device.flops[train.compute_dtype] * options.devices / each
    rows = largest_batch(model, train, device.facts, device.memory, **mesh)
    lines = {
        "estimate": "a lower bound; XLA's peak is usually 1.0 to 1.4 times this",
        "trained parameters": f"{count_parameters(program.state['params']):,}",
        "execution": program.precision.execution.describe(),
        "FLOPs a step": f"{each * batch * length:.3g} ({each:.3g} a token)",
        f"tokens/s at {options.utilisation:.0%} of the peak": f"{rate:,.0f} ({batch * length / rate:.3f} s a step)",
        "largest batch that fits": f"at most {rows:,} rows, by the estimate" if rows else "none",
    }
    for name, value in lines.items():
        print_line(console, name, value)


def _print_compiled(options: Options, device: Accelerator, program: Program, console: Any) -> None:
    from jax.errors import JaxRuntimeError

    from gpt2jax.plan.devices import topology_devices
    from gpt2jax.plan.program import compile_program, peak_bytes
    from gpt2jax.sharding import make_mesh

    try:
        devices = topology_devices(device, options.devices)
    except LookupError as error:
        print_line(console, "not compiled", str(error))
        return
    mesh = make_mesh(fsdp=options.fsdp, tensor=options.tensor_parallel, devices=devices)
    try:
        with console.status(f"compiling for {options.devices} x {device.title}"):
            compiled = compile_program(program, mesh)
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print_line(
            console, "does not fit", str(error).partition(": ")[2].splitlines()[0]
        )  # XLA:TPU refuses to compile
        return
    peak, arguments = peak_bytes(compiled, device.backend), compiled.memory_analysis().argument_size_in_bytes
    parts = f"{arguments / 1e9:.2f} of arguments and {(peak - arguments) / 1e9:.2f} while it runs"
    conclusion = "fits" if peak <= device.memory else "does not fit"
    print_line(console, "compiled", f"{peak / 1e9:.2f} GB on each device, XLA's peak: {parts}; {conclusion}")
