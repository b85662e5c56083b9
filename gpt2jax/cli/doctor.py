"""`gpt2jax doctor`: whether this installation works: versions, devices, caches, numerics, and resuming a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from gpt2jax.cli.common import run_command

_STYLES = {"ok": "green", "note": "yellow", "failed": "bold red"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Check this installation: versions, devices, caches, numerics, and resuming a run that was killed.

    The exit code is 0 if all is well, and 1 if a check failed; notes do not count.

    $ gpt2jax doctor
    $ gpt2jax doctor --no-numerics --no-resume

    Attributes:
        numerics: compare logits and gradients of two models with float64; takes half a minute on two cores.
        resume: train a tiny model in a temporary folder, kill the run, and resume it.
    """

    numerics: bool = True
    resume: bool = True


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_command("doctor", Options, run, argv)


def run(options: Options) -> None:
    """Print a table of what the checks find, row by row; exit with 1 if one failed."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from gpt2jax.doctor.findings import run_check
    from gpt2jax.utils.notices import printable

    console = Console()
    table, failed = Table("subject", "status", Column("found", overflow="fold")), 0
    with console.status("") as status:
        for subject, check in _checks(options):
            status.update(subject)
            found = list(run_check(subject, check))
            for finding in found:
                words = (finding.subject, Text(finding.status, _STYLES[finding.status]), finding.text)
                table.add_row(*(Text(printable(word)) if isinstance(word, str) else word for word in words))
                failed += finding.status == "failed"
            if subject == "devices" and any(finding.status == "failed" for finding in found):
                break  # nothing can be computed
    console.print(table)
    if failed:
        console.print(f"{failed} of {table.row_count} rows failed")
        raise SystemExit(1)
    console.print("all is well")


def _checks(options: Options) -> Iterator[tuple[str, Callable]]:
    """Yield the checks; what they import may be what does not work, and is imported when they run."""

    def numerics():
        from gpt2jax.doctor.numerics import check_numerics

        return check_numerics()

    def resume():
        from gpt2jax.doctor.resume import check_resume

        return check_resume()

    from gpt2jax.doctor.environment import check_caches, check_devices, check_versions

    yield from (("versions", check_versions), ("devices", check_devices), ("caches", check_caches))
    if options.numerics:
        yield "numerics", numerics
    if options.resume:
        yield "write, kill, resume", resume
