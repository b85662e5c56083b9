"""What a setting's value may be, asked the same way everywhere."""

from __future__ import annotations

import numbers
from typing import Any

LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127


def is_whole(value: Any) -> bool:
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
    if not is_whole(value) or value < least:
        legal = "a positive whole number" if least == 1 else f"a whole number of at least {least}"
        raise ValueError(f"{name}={value!r} must be {legal}")
    return int(value)
