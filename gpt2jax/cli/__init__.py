"""The commands: `gpt2jax NAME` and `scripts/NAME.py` are the same."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

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


_HUGE_PAGES = "glibc.malloc.hugetlb"


def start(*command: str) -> None:
    """Entry point of a program: `main` of its arguments, behind those of `command`, in huge pages if there are any.

    A training step on a CPU takes gigabytes from the system and gives them back each time. In pages of 2 MiB in place
    of 4 KiB that costs a tenth as much, a sixth of the step. The GNU C library asks for them only if it is told to
    when a program starts, so the program is started anew, as the same process.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if _HUGE_PAGES not in tunables and _huge_pages_on_request():
        settings = ":".join(filter(None, (tunables, f"{_HUGE_PAGES}=1")))
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, os.environ | {"GLIBC_TUNABLES": settings})
    try:
        main([*command, *sys.argv[1:]])
    except KeyboardInterrupt:  # while modules load; the commands themselves say more
        print("gpt2jax: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _huge_pages_on_request() -> bool:
    """Whether this system has huge pages for whoever asks, and an allocator that can be told to."""
    # another system than Linux, or another C library, has none of these
    with contextlib.suppress(OSError, ValueError, AttributeError):
        library = os.confstr("CS_GNU_LIBC_VERSION") or ""  # "glibc 2.36"
        version = tuple(map(int, library.removeprefix("glibc ").split(".")))
        asked = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        return version >= (2, 35) and "[madvise]" in asked
    return False


def main(argv: Sequence[str]) -> None:
    """Runs the command that the arguments begin with."""
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
