"""Lines that tell a user what was decided for them; each is said once, through the logger "gpt2jax"."""

from __future__ import annotations

import functools
import logging

LOGGER = logging.getLogger("gpt2jax")


@functools.lru_cache(maxsize=1000)
def say_once(message: str) -> None:
    """Log a line as a warning, unless the program has said it before; without handlers it goes to standard error."""
    LOGGER.warning("%s", printable(message))


def printable(text: str) -> str:
    """Return a text with control characters escaped: what a file holds must not steer a terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def enumerate_names(names: list[str], most: int = 5) -> str:
    """Return names joined by commas, at most so many, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
