"""The commands: `gpt2jax NAME` and `scripts/NAME.py` are the same."""

from __future__ import annotations

import importlib
import os
import sys

# XLA:CPU cuts each program into 32 parts for as many compiler threads; with few cores that makes compiling take
# twice as long. It is read once, when jax starts, so it is set before anything imports jax.
if "xla_cpu_parallel_codegen_split_count" not in os.environ.get("XLA_FLAGS", ""):
    _parts = f"--xla_cpu_parallel_codegen_split_count={min(32, os.cpu_count() or 1)}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_parts}".strip()

COMMANDS = {
    "finetune": "train a model on texts, compare it with the one it came from, write a report",
    "generate": "continue prompts",
    "evaluate": "loss and accuracy of a model on texts",
    "compare": "several models on the same texts, with a report",
    "convert": "weights from one format into another, and proof that they are the same",
    "plan": "what a training run needs in memory and FLOPs on a device that need not be here",
}


def main(argv: list[str] | None = None) -> None:
    """Entry point of `gpt2jax NAME ...`."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: gpt2jax COMMAND [options]\n\ncommands:")
        for name, what in COMMANDS.items():
            print(f"  {name:<10} {what}")
        print("\n`gpt2jax COMMAND --help` lists the options of a command.")
        return
    if argv[0] in ("-V", "--version"):
        from gpt2jax import __version__

        print(f"gpt2jax {__version__}")
        return
    if argv[0] not in COMMANDS:
        print(f"gpt2jax: unknown command {argv[0]!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    importlib.import_module(f"gpt2jax.cli.{argv[0]}").main(argv[1:])
