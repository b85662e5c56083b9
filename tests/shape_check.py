"""The type checker of the import hook in conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype


def check_shapes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """Check arguments and result of every function except constructors."""
    return function if function.__name__ == "__init__" else beartype(function, *args, **kwargs)
