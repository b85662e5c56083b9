"""Read JSON files of a known shape; whatever is wrong with one is a ValueError that names the file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from gpt2jax.utils.validation import must_be

Kind = type | tuple[type, ...]

KIND_NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    NoneType: "null",
}


def read_json(
    path: str | os.PathLike[str],
    required: Iterable[str] | Mapping[str, Kind] = (),
    optional: Mapping[str, Kind] | None = None,
) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Args:
        path: the file.
        required: names that the object must have; or a dict from name to the type, or types, that its value must have
            (`object` for any). A whole number is legal where `float` is asked for, true and false are no numbers.
        optional: the same for names that may be absent.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, not JSON, nested too deeply, not an object, or a name is missing or has a
            value of another type; the message begins with the path.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and too many digits are ValueErrors
        raise ValueError(f"{path} is damaged: it is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it must hold an object, got {_describe_kind(type(content))}")
    kinds = dict(required) if isinstance(required, Mapping) else dict.fromkeys(required, object)
    missing = [name for name in kinds if name not in content]
    if missing:
        raise ValueError(f"{path} is damaged: it has no {' and no '.join(missing)}")
    for name, kind in {**kinds, **(optional or {})}.items():
        if name in content and not _is_of_kind(content[name], kind):
            raise ValueError(must_be(f"{path}: {name}", _describe_kind(kind), content[name]))
    return content


def _is_of_kind(value: Any, kind: Kind) -> bool:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(value, bool):  # a subclass of int
        return bool in kinds or object in kinds
    return isinstance(value, (*kinds, int) if float in kinds else kinds)


def _describe_kind(kind: Kind) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(KIND_NAMES.get(one, one.__name__) for one in kinds)
