"""Memory of the loss beside the activations: XLA's own plan, for this CPU and for accelerators that need not be here.

    python benchmarks/loss_memory.py                  GPT-2's vocabulary and width, 16 rows of 1,024 tokens
    python benchmarks/loss_memory.py --rows 8 --size gpt2-xl

Compiles the loss alone, the loss with its gradients by the hidden states and the head, and the same of a dense loss,
which holds all logits. "temporaries" are what is needed beside arguments and results; the gradients are results.
Accelerators are left out where jax's plugin (`pip install -e ".[cuda]"`, `".[tpu]"`) is missing. Nothing is run.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from contenders import print_table
from jax.sharding import SingleDeviceSharding
from training import dense_loss

from gpt2jax.model.config import PRESETS
from gpt2jax.ops.cross_entropy import cross_entropy
from gpt2jax.ops.device import Device
from gpt2jax.ops.precision import Precision
from gpt2jax.plan.devices import find_device, topology_devices
from gpt2jax.plan.program import compile_for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="gpt2", choices=PRESETS)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    rows = []
    for name in ("cpu", "h100", "v5e"):
        try:
            place, backend = find_place(name)
        except LookupError as error:
            print(f"left out: {name}: {error}")
            continue
        for dtype in ("float32", "bfloat16"):
            figures = [f"{size / 1e6:,.0f}" for size in temporaries(options, place, backend, dtype)]
            rows.append((f"{name} {dtype}", *figures))
    columns = ("device, dtype", "loss alone", "with both gradients", "dense, with both")
    tokens = f"{options.rows} x {options.length} tokens"
    title = f"temporaries of the loss, MB: {options.size}, {tokens}, jax {jax.__version__}"
    print_table(title, columns, rows)


def find_place(name: str) -> tuple[Any, str]:
    """The device to compile for, and its backend."""
    if name == "cpu":
        return jax.devices("cpu")[0], "cpu"
    device = find_device(name)
    [place] = topology_devices(device, 1)
    return place, device.backend


def temporaries(options: argparse.Namespace, place: Any, backend: str, dtype: str) -> list[int]:
    """Bytes beside arguments and results of: the loss, it and both gradients, the dense loss and both gradients."""
    precision, config = Precision.for_device(dtype, Device.of_backend(backend)), PRESETS[options.size]
    shape = (options.rows, options.length)
    here = SingleDeviceSharding(place)
    arguments = [
        jax.ShapeDtypeStruct(size, kind, sharding=here)
        for size, kind in (
            ((*shape, config.n_embd), precision.activation_dtype),
            ((config.vocab_size, config.n_embd), jnp.float32),
            (shape, jnp.int32),
            (shape, jnp.float32),
        )
    ]

    def ours(hidden, head, targets, weights):
        return cross_entropy(hidden, head, targets, weights, precision)[0]

    def dense(hidden, head, targets, weights):
        return dense_loss(hidden, head, targets, weights, precision)[0]

    functions = (ours, *(jax.value_and_grad(f, argnums=(0, 1)) for f in (ours, dense)))
    compiled = (compile_for(backend, jax.jit(function), *arguments) for function in functions)
    return [program.memory_analysis().temp_size_in_bytes for program in compiled]


if __name__ == "__main__":
    main()
