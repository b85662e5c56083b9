"""Notices: one line each about what a user should know of files or texts although it is not an error."""

from __future__ import annotations

import functools
import numbers
import shutil
import sys
import textwrap
import unicodedata
import warnings
from typing import TextIO


class Notice(UserWarning):
    """What was found in a user's files or texts, and what is done about it; the commands print it as one line."""


def notice(message: str) -> None:
    """Give a notice; Python shows each text once."""
    warnings.warn(printable(message), Notice, stacklevel=3)


def printable(text: str) -> str:
    """Return a text with control characters escaped: what a file holds must not steer a terminal."""
    if text.isprintable():
        return text
    is_shown = {char: char.isprintable() or unicodedata.category(char) == "Zs" for char in set(text)}
    return "".join(char if is_shown[char] else repr(char)[1:-1] for char in text)


def terminal_text(text: str) -> str:
    """Return a text of several lines for a terminal, which must not obey it; unchanged for a file or a pipe."""
    if not sys.stdout.isatty():
        return text
    return "".join(char if char in "\n\t" else printable(char) for char in text)


def wrap_lines(text: str, stream: TextIO) -> str:
    """Break long lines between words for a terminal; a file, a pipe, and commands behind "$" keep them whole."""
    if not stream.isatty():
        return text
    columns = shutil.get_terminal_size().columns
    wrap = functools.partial(textwrap.wrap, width=columns, break_long_words=False, break_on_hyphens=False)
    lines: list[str] = []
    for line in text.split("\n"):
        is_whole = len(line) <= columns or line.startswith("$ ") or "\x1b" in line
        lines += [line] if is_whole else wrap(line)
    return "\n".join(lines)


def count_noun(count: float, noun: str) -> str:
    """Return a count with its noun, "1 step" or "2,000 steps"."""
    text = f"{count:,}" if isinstance(count, numbers.Integral) else f"{count:.3g}"
    return f"{text} {noun}" if text == "1" else f"{text} {noun}s"


def enumerate_names(names: list[str], most: int = 5) -> str:
    """Return names joined by commas, at most so many, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
