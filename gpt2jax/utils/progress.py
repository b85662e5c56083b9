"""What standard error can show."""

from __future__ import annotations

import os
import sys


def redraws() -> bool:
    """Whether standard error is a terminal on which a bar can be drawn: it may be a file, a dumb one, or closed."""
    return (
        sys.stderr is not None
        and sys.stderr.isatty()
        and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
    )
