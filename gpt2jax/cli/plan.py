"""`gpt2jax plan`: what a training run needs in memory and FLOPs on a device that need not be here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from gpt2jax.cli.common import LORA_RANK, LORA_TARGETS, run_command

if TYPE_CHECKING:
    from gpt2jax.model.config import GPT2Config
    from gpt2jax.plan.devices import Device
    from gpt2jax.train.config import FinetuneConfig


@dataclasses.dataclass(frozen=True)
class Options:
    """What a training run needs on a device: memory by kind, FLOPs, tokens per second, the largest batch.

    Attributes:
        model: gpt2-mini, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a hub id, or a path.
        device: h100, a100, a100-40, l4, rtx4090, v5e, v6e.
        devices: how many of them.
        batch_size: rows of one optimizer step, over all devices.
        gradient_accumulation_steps: parts that it is computed in.
        sequence_length: tokens of one row. Default: the model's context, at most 1024.
        compute_dtype: operands of matrix products.
        optimizer: adamw, adafactor, lion, muon or sgd.
        moments_dtype: of the optimizer's moments.
        remat: what the backward pass computes again: none, dots, weights or full.
        dropout: of the model in training. cuDNN's attention needs 0.
        lora: train low-rank adapters instead of all parameters.
        lora_rank: their rank.
        lora_targets: linears that get one.
        base_dtype: of the frozen parameters under adapters: float32, bfloat16 or int8. Default: float32.
        fsdp: devices that share one copy of parameters and moments.
        tensor_parallel: devices that share the work of one row.
        utilisation: share of the device's peak FLOP/s that the tokens per second assume.
        compile: let XLA compile the step for the device as well, where jax's plugin for it is installed.
    """

    model: str = "gpt2"
    device: str = "h100"
    devices: int = 1
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    sequence_length: int | None = None
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    optimizer: str = "adamw"
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: str = "none"
    dropout: float = 0.0
    lora: bool = False
    lora_rank: int = LORA_RANK
    lora_targets: tuple[str, ...] = LORA_TARGETS
    base_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    fsdp: int = 1
    tensor_parallel: int = 1
    utilisation: float = 0.4
    compile: bool = True


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    run_command("plan", Options, run, argv)


def run(options: Options) -> None:
    """Estimates, compiles where that is possible, prints."""
    import jax
    from rich.console import Console

    from gpt2jax.plan.devices import find_device

    device = find_device(options.device)
    _check(options)
    # nothing is computed here: a plugin that is only to compile must not look for its device
    jax.config.update("jax_platforms", "cpu")
    console = Console()
    model, train = _settings(options)
    _print_estimate(options, device, model, train, console)
    if options.compile:
        _print_compiled(options, device, model, train, console)


def _check(options: Options) -> None:
    """Raises ValueError where the options don't fit together."""
    if options.devices < 1 or options.devices % (options.fsdp * options.tensor_parallel):
        raise ValueError(
            f"devices={options.devices} must be a multiple of fsdp={options.fsdp} times "
            f"tensor_parallel={options.tensor_parallel}"
        )
    rows, ways = (
        options.batch_size // options.gradient_accumulation_steps,
        options.devices // options.tensor_parallel,
    )
    if rows % ways:
        raise ValueError(
            f"batch_size={options.batch_size} / gradient_accumulation_steps="
            f"{options.gradient_accumulation_steps} can't be divided among {ways} devices"
        )
    if not 0 < options.utilisation <= 1:
        raise ValueError(f"utilisation={options.utilisation} must be above 0 and at most 1")


def _settings(options: Options) -> tuple[GPT2Config, FinetuneConfig]:
    from gpt2jax.loading import load
    from gpt2jax.lora.config import LoRAConfig
    from gpt2jax.model.config import PRESETS
    from gpt2jax.train.config import FinetuneConfig
    from gpt2jax.train.step import with_dropout

    model = PRESETS[options.model] if options.model in PRESETS else load(options.model).config
    lora = LoRAConfig(options.lora_rank, targets=options.lora_targets) if options.lora else None
    same = (
        "batch_size",
        "gradient_accumulation_steps",
        "sequence_length",
        "compute_dtype",
        "optimizer",
        "moments_dtype",
        "remat",
        "base_dtype",
    )
    train = FinetuneConfig(
        **{name: getattr(options, name) for name in same},
        lora=lora,
        fsdp=options.fsdp,
        tensor_parallel=options.tensor_parallel,
    )
    return with_dropout(model, options.dropout), train


def _print_estimate(
    options: Options, device: Device, model: GPT2Config, train: FinetuneConfig, console: Any
) -> None:
    from rich.table import Table

    from gpt2jax.plan.estimate import estimate_memory, flops_per_token, largest_batch, trained_parameters
    from gpt2jax.plan.program import make_program

    program = make_program(model, train, device.backend)
    mesh = {"fsdp": options.fsdp, "tensor": options.tensor_parallel, "devices": options.devices}
    memory = estimate_memory(program, **mesh)
    batch, length = program.batch["tokens"].shape
    table = Table(
        title=f"{options.model} on {options.devices} x {device.title}, {batch} x {length} tokens a step"
    )
    table.add_column("memory on each device")
    table.add_column("GB", justify="right")
    for name, size in dataclasses.asdict(memory).items():
        table.add_row(name, f"{size / 1e9:.2f}")
    table.add_section()
    table.add_row("estimate", f"[bold]{memory.total / 1e9:.2f}[/]")
    table.add_row("the device has", f"{device.memory / 1e9:.0f}")
    console.print(table)
    each = flops_per_token(model, length, lora=train.lora, remat=train.remat)
    rate = options.utilisation * device.flops[train.compute_dtype] * options.devices / each
    largest = largest_batch(model, train, device.backend, int(0.95 * device.memory), **mesh)
    fits = (
        "none" if largest is None else f"{largest[0]:,} rows ({largest[1].total / 1e9:.1f} GB on each device)"
    )
    lines = {
        "trained parameters": f"{trained_parameters(program):,}",
        "attention": f"{_attention(program)}",
        "FLOPs a step": f"{each * batch * length:.3g} ({each:.3g} a token)",
        f"tokens/s at {options.utilisation:.0%} of the peak": f"{rate:,.0f} ({batch * length / rate:.3f} s a step)",
        "largest batch that fits": fits,
    }
    for name, value in lines.items():
        console.print(f"[bold]{name}[/]  {value}", highlight=False)


def _attention(program: Any) -> str:
    from gpt2jax.ops.attention import supports_memory_efficient_attention

    kind = program.precision.attention
    return (
        kind
        if supports_memory_efficient_attention(
            kind, program.model.head_dim, drops=program.model.attn_pdrop > 0
        )
        else "xla (all scores are kept)"
    )


def _print_compiled(
    options: Options, device: Device, model: GPT2Config, train: FinetuneConfig, console: Any
) -> None:
    from gpt2jax.plan.devices import described_devices
    from gpt2jax.plan.program import compile_program, make_program, planned_bytes
    from gpt2jax.sharding import make_mesh

    try:
        devices = described_devices(device, options.devices)
    except LookupError as error:
        console.print(f"[bold]not compiled[/]  {error}", highlight=False)
        return
    mesh = make_mesh(fsdp=options.fsdp, tensor=options.tensor_parallel, devices=devices)
    with console.status(f"compiling for {options.devices} x {device.title}"):
        compiled = compile_program(make_program(model, train, device.backend), mesh)
    total = planned_bytes(compiled, device.backend)
    arguments = compiled.memory_analysis().argument_size_in_bytes
    console.print(
        f"[bold]compiled[/]  {total / 1e9:.2f} GB on each device: {arguments / 1e9:.2f} of arguments, "
        f"{(total - arguments) / 1e9:.2f} while it runs (XLA's own plan; not run)",
        highlight=False,
    )
