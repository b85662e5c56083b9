"""The commands: `gpt2jax NAME`; `scripts/finetune.py` is `gpt2jax finetune` for a checkout."""

from __future__ import annotations

import importlib
import shutil
import sys
import textwrap
from collections.abc import Sequence

from gpt2jax.cli._launcher import keep_compiled_programs, restart_in_huge_pages, set_compiler_parts
from gpt2jax.utils.validation import unknown_name

set_compiler_parts()

COMMANDS = {
    "finetune": "train a model on texts, compare it with the model it started from, write a report",
    "study": "evaluate, fine-tune in stages, evaluate each, generate with each, write one report",
    "generate": "continue prompts",
    "evaluate": "loss and accuracy of a model on texts",
    "compare": "compare several models on the same texts, write a report",
    "convert": "convert weights into another format, and check that they are the same",
    "plan": "memory and FLOPs of a training run on a given device, which need not be here",
    "doctor": "check this installation: versions, devices, caches, numerics, resuming a killed run",
}


def start(*command: str) -> None:
    """Run the program: `main` with the arguments in `command`, then those of the process."""
    restart_in_huge_pages()
    keep_compiled_programs()
    try:
        main([*command, *sys.argv[1:]])
    except KeyboardInterrupt:  # while modules load; the commands themselves say more
        print("gpt2jax: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _print_help() -> None:
    """Print the commands, each on a line if the terminal is wide enough."""
    print("usage: gpt2jax COMMAND [options]\n\ncommands:")
    columns = shutil.get_terminal_size().columns
    for name, description in COMMANDS.items():
        print(textwrap.fill(f"  {name:<10} {description}", columns, subsequent_indent=" " * 13))
    print("\n`gpt2jax COMMAND --help` lists the options of a command.")
    print("`gpt2jax completion bash` (zsh, tcsh) prints a script that completes names.")


def main(argv: Sequence[str]) -> None:
    """Run the command that the arguments begin with."""
    if not argv or argv[0] in ("-h", "--help"):
        _print_help()
        return
    if argv[0] == "completion":
        from gpt2jax.cli.completion import print_completion

        print_completion(argv[1:], list(COMMANDS))
        return
    if argv[0] in ("-V", "--version"):
        from gpt2jax import __version__

        print(f"gpt2jax {__version__}")
        return
    if argv[0] not in COMMANDS:
        print(f"gpt2jax: error: {unknown_name('command', argv[0], COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    importlib.import_module(f"gpt2jax.cli.{argv[0]}").main(argv[1:])
