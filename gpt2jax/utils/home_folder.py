"""The user's home folder, which files that are passed on must not name."""

from __future__ import annotations

import os
import re
from typing import Any


def abbreviate_home(value: Any) -> Any:
    """Return a value, such as the content of a JSON file, with "~" for the home folder at the beginning of paths.

    `check_path` expands it again, on another machine to the home folder there.
    """
    if isinstance(value, dict):
        return {name: abbreviate_home(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [abbreviate_home(item) for item in value]
    if not isinstance(value, str):
        return value
    home = os.path.expanduser("~")
    for place in (home, os.path.realpath(home)):  # the home folder may be a link
        place = place.rstrip("/\\")
        if place not in ("", "~"):
            # a path begins a text, or stands in a command line behind a space, a quote or an equals sign
            value = re.sub(rf"(?<![^\s'\"=]){re.escape(place)}(?![^/\\\s'\"])", "~", value)
    return value
