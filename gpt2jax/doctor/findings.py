"""What a check found: one row of the table of `gpt2jax doctor`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

Status = Literal["ok", "failed", "note"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One row.

    Attributes:
        subject: what was looked at.
        status: "ok"; "failed" if results can't be trusted or a command would fail; "note" for what a user should know.
        text: what was found.
    """

    subject: str
    status: Status
    text: str


def run_check(subject: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield what a check finds; an exception is a finding too, because the other checks must go on."""
    try:
        yield from check()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        yield Finding(subject, "failed", reason)
