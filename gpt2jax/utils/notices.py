"""Notices: what a user should know about files or texts although it is not an error; one line each."""

from __future__ import annotations

import warnings


class Notice(UserWarning):
    """What was found in a user's files or texts, and what is done about it; the commands print it as one line."""


def notice(message: str) -> None:
    """Give a notice; Python shows each text once."""
    warnings.warn(message, Notice, stacklevel=3)
