"""What a setting's value may be, asked the same way everywhere."""

from __future__ import annotations

import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127
SEED_RANGE = 2**32


def set_field(settings: Any, name: str, value: Any) -> None:
    """Replaces a field of frozen settings by its checked value: Python's own kind, which JSON and jit take."""
    object.__setattr__(settings, name, value)


def is_integer(value: Any) -> bool:
    """Whether it is a whole number, of Python or NumPy, which True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a number that is finite in float32, which True and False are not."""
    return (
        isinstance(value, numbers.Real)
        and not isinstance(value, bool)
        and -LARGEST_FLOAT32 <= value <= LARGEST_FLOAT32
    )


def check_count(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int; raises ValueError unless it is a whole number of at least `least`."""
    if not is_integer(value) or value < least:
        legal = "a positive whole number" if least == 1 else f"a whole number of at least {least}"
        raise ValueError(f"{name}={value!r} must be {legal}")
    return int(value)


def is_seed(value: Any) -> bool:
    """Whether it is a whole number of 32 bits."""
    return is_integer(value) and 0 <= value < SEED_RANGE


def check_seed(seed: Any) -> int:
    """`seed` as an int; raises ValueError unless it is a whole number of 32 bits."""
    if not is_seed(seed):
        raise ValueError(f"seed={seed!r:.60} must be a whole number from 0 to 2**32 - 1")
    return int(seed)


def check_model(name: str, model: Any) -> None:
    """Raises ValueError for what has no configuration and parameters, such as a model's name."""
    if not hasattr(model, "config") or not hasattr(model, "params"):
        raise ValueError(f"{name}={model!r:.60} is no model; gpt2jax.load(name) gives one")


def check_path(name: str, value: Any) -> Path:
    """`value` as a path, "~" as the home folder; raises ValueError unless it is one: "" is none.

    The home folder of a user that there is not stays as it is written.
    """
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError(f"{name}={value!r:.60} must be a name or a path, and not empty")
    return Path(os.path.expanduser(path))


def check_texts(name: str, texts: Any) -> None:
    """Raises TypeError for what is no list of texts, and nothing that gives them one by one.

    A single text would be taken as its letters, and a dict of columns or splits as the names of these. The
    order of a set is another one in each program.
    """
    if isinstance(texts, str | bytes):
        raise TypeError(f"{name} is one string; pass a list of texts")
    if isinstance(texts, Mapping | set | frozenset) or not (
        hasattr(texts, "__iter__") or hasattr(texts, "__getitem__")
    ):
        raise TypeError(f"{name}={texts!r:.60} is no list of texts")
