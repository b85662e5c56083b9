"""`gpt2jax completion`: what makes a shell complete the commands and their options, written by tyro."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Annotated, Any, Union

import tyro

from gpt2jax.cli.common import exit_with_error
from gpt2jax.utils.validation import must_be

SHELLS = ("bash", "zsh", "tcsh")


def print_completion(argv: Sequence[str], commands: Sequence[str]) -> None:
    """Print the script of a shell.

    Args:
        argv: the name of the shell.
        commands: the names of the commands.
    """
    if len(argv) != 1 or argv[0] not in SHELLS:
        hint = '; for example: eval "$(gpt2jax completion bash)"'
        exit_with_error(
            "completion", must_be("the shell", f"one of {', '.join(SHELLS)}", " ".join(argv)) + hint
        )
    parsers: list[Any] = []
    for name in commands:
        options = importlib.import_module(f"gpt2jax.cli.{name}").Options
        parsers.append(Annotated[options, tyro.conf.subcommand(name, prefix_name=False)])
    every: Any = Union[tuple(parsers)]  # noqa: UP007
    tyro.cli(every, prog="gpt2jax", args=["--tyro-print-completion", argv[0]])
