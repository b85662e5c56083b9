"""Read JSON, and JSON files of a known shape; whatever is wrong with it is a ValueError that names the place."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from gpt2jax.utils.limits import check_json_size
from gpt2jax.utils.stand_ins import describe_stand_in
from gpt2jax.utils.validation import must_be

Kind = type | tuple[type, ...]
MAX_DEPTH = (
    100  # of lists and objects within each other: what reads the values may call itself for each level
)

KIND_NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    NoneType: "null",
}


def parse_json(text: str | bytes, place: str) -> Any:
    """Return the value of a text in JSON.

    Raises:
        ValueError: it is not JSON or not UTF-8, or lists and objects are nested more than `MAX_DEPTH` deep; the message
            begins with `place`.
    """
    try:
        content = json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{place} is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError and too many digits are ValueErrors
        raise ValueError(f"{place} is not JSON: {error}") from None
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [
            value
            for node in level
            if isinstance(node, (dict, list))
            for value in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return content
    raise ValueError(f"{place} is not JSON that can be read: it is nested more than {MAX_DEPTH} deep")


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
        ValueError: the file is larger than `gpt2jax.utils.limits` allows, not UTF-8, not JSON, nested too deeply, not
            an object, or a name is missing or has a value of another type; the message begins with the path.
    """
    # opening a pipe waits for ever, a device has no end
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} must be a file, got a folder, a pipe or a device")
    check_json_size(str(path), os.path.getsize(path))
    data = Path(path).read_bytes()
    try:
        content = parse_json(data, "it")
    except ValueError as error:
        if reason := describe_stand_in(data[:512]):
            raise ValueError(f"{path} {reason}") from None
        raise ValueError(f"{path} is damaged: {error}") from None
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
