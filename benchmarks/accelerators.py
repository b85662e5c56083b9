"""Training steps compiled for GPUs and TPUs that need not be here: memory planned and compiled, kernels.

    python benchmarks/accelerators.py                 all cases
    python benchmarks/accelerators.py --only gpt2-xl  those whose name holds that

Needs jax's plugins (`pip install -e ".[cuda]"`, `".[tpu]"`), not their devices. Nothing is run and nothing timed:
"estimate" is what `gpt2jax plan` says, "compiled" what XLA's own plan of the compiled step says.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax
from rich.console import Console
from rich.table import Table

from gpt2jax.config import PRESETS
from gpt2jax.distributed import make_mesh
from gpt2jax.lora import LoRAConfig
from gpt2jax.plan.devices import described_devices, find_device
from gpt2jax.plan.estimate import estimate_memory
from gpt2jax.plan.program import compile_program, make_program
from gpt2jax.train.config import FinetuneConfig
from gpt2jax.train.loop import with_dropout


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step: model, device, how many of them, rows of 1,024 tokens, and settings that are not the default."""

    model: str
    device: str
    devices: int
    rows: int
    settings: dict = dataclasses.field(default_factory=dict)
    dropout: float = 0.0

    @property
    def name(self) -> str:
        """As the table shows it."""
        settings = [f"{k}={v}" if not isinstance(v, LoRAConfig) else "lora" for k, v in self.settings.items()]
        settings += [f"dropout={self.dropout}"] if self.dropout else []
        return " ".join([self.model, f"B={self.rows}", *settings])


CASES = (
    Case("gpt2", "h100", 1, 16),
    Case("gpt2", "h100", 1, 64),
    Case("gpt2", "h100", 1, 16, dropout=0.1),
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
    Case("gpt2-xl", "v5e", 8, 64, {"fsdp": 4, "tensor_parallel": 2, "remat": "full", "accumulation": 4}),
)


def main() -> None:
    """Compiles the cases one after the other and prints a table of all that could be compiled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    console = Console(width=150)
    columns = ("step", "devices", "estimate GB", "compiled GB", "ratio", "arguments GB", "cuDNN attention")
    table = Table(*columns, title=f"one device's memory, T=1024, jax {jax.__version__}")
    for case in CASES:
        if options.only in case.name:
            try:
                with console.status(f"{case.name} on {case.devices} x {case.device}"):
                    table.add_row(*measure(case))
            except LookupError as error:
                console.print(f"left out: {case.name}: {error}", highlight=False)
    console.print(table)


def measure(case: Case) -> tuple[str, ...]:
    """A row of the table."""
    device = find_device(case.device)
    train = FinetuneConfig(
        batch_size=case.rows, sequence_length=1024, **{"compute_dtype": "bfloat16"} | case.settings
    )
    program = make_program(with_dropout(PRESETS[case.model], case.dropout), train, device.backend)
    mesh = make_mesh(
        fsdp=train.fsdp, tensor=train.tensor_parallel, devices=described_devices(device, case.devices)
    )
    estimate = estimate_memory(
        program, fsdp=train.fsdp, tensor=train.tensor_parallel, devices=case.devices
    ).total
    compiled = compile_program(program, mesh, device.backend)
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes
    kernels = compiled.as_text().count('custom_call_target="__cudnn$fmha')
    return (
        case.name,
        f"{case.devices} x {case.device}",
        f"{estimate / 1e9:.2f}",
        f"{total / 1e9:.2f}",
        f"{estimate / total:.2f}",
        f"{memory.argument_size_in_bytes / 1e9:.2f}",
        str(kernels) if device.backend == "gpu" else "",
    )


if __name__ == "__main__":
    main()
