"""Rows of JSON: lines, an array, an object of columns, an index-oriented object, or an array within an object."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from gpt2jax.data.columns import TEXT_COLUMNS, Columns, cell_of, is_text
from gpt2jax.data.files import File
from gpt2jax.utils.json_files import parse_json
from gpt2jax.utils.validation import unknown_name

Row = tuple[str, Any]


def json_rows(file: File, columns: Columns, records_field: str | None = None) -> Iterator[Row]:
    """Yield (place for messages, row) of a JSON file; its content says which form it has, not its extension.

    Args:
        file: what to read.
        columns: those that the caller names tell rows from columns.
        records_field: name of the field with the rows, in an object that holds them and more; "a.b" for one within a
            field.

    Raises:
        ValueError: the content is not JSON, or its rows are not clear.
    """
    lines = file.lines()
    start = list(itertools.islice((line for line in lines if line[1].strip()), 2))
    lines = itertools.chain(start, lines)
    if not start:
        return iter(())
    is_array = start[0][1].lstrip().startswith("[")
    is_lines = len(start) == 2 and _is_json(start[0][1], dict | list | str | None)
    if records_field is not None and is_lines:
        raise ValueError(
            f"{file.name} has one row a line, not an object that holds them; leave records_field out"
        )
    if records_field is None and (is_lines or (file.suffixes[0] != ".json" and not is_array)):
        return json_lines(file, lines)
    value = parse_json("".join(_whole(file, lines)), file.name)
    if records_field is not None:
        value = _field(value, records_field, file.name)
    if isinstance(value, dict):
        value = _rows_of_object(value, columns, file.name)
    rows = value if isinstance(value, list) else [value]
    return ((f"{file.name}, entry {number}", row) for number, row in enumerate(rows, start=1))


def _whole(file: File, lines: Iterable[tuple[int, str]]) -> Iterator[str]:
    """Yield the lines of a file that must be in memory as a whole."""
    size = 0
    for _, line in lines:
        size += len(line)
        file.check_text_size(size)
        yield line


def json_lines(file: File, lines: Iterable[tuple[int, str]]) -> Iterator[Row]:
    """Yield the rows of numbered lines of JSON."""
    for number, line in lines:
        if not line.strip():
            continue
        place = f"{file.name}, line {number}"
        yield place, parse_json(line, place)


def is_json_object(line: str) -> bool:
    """Return whether a line is a whole object of JSON."""
    return _is_json(line, dict)


def _is_json(line: str, kind: Any) -> bool:
    try:
        return isinstance(parse_json(line, ""), kind)
    except ValueError:
        return False


def _field(value: Any, name: str, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not an object: it has no field {name!r}; leave records_field out")
    found = cell_of(value, name)
    if not isinstance(found, list | dict):
        if found is None:
            raise ValueError(f"{where}: {unknown_name('field', name, value)} (records_field)")
        raise ValueError(f"{where}: field {name!r} must hold rows, got a {type(found).__name__}")
    return found


def _rows_of_object(value: dict[str, Any], columns: Columns, where: str) -> list[Any]:
    """Return the rows of an object of columns or of rows, or of an object that is one row."""
    cells = list(value.values())
    if set(value) in ({"columns", "data"}, {"columns", "index", "data"}):  # pandas, orient="split"
        return _rows_of_split(value["columns"], value["data"], where)
    has_lists = bool(cells) and all(isinstance(cell, list) for cell in cells)
    if has_lists and any(not all(isinstance(row, dict) for row in column) for column in cells):
        if len(set(map(len, cells))) > 1:
            raise ValueError(f"{where} has columns of different lengths")
        return [dict(zip(value, row, strict=True)) for row in zip(*cells, strict=True)]
    is_nested = bool(cells) and all(isinstance(cell, dict) for cell in cells)
    # the object within may hold rows or columns itself
    is_wrapped = is_nested and len(cells) == 1 and all(isinstance(cell, list) for cell in cells[0].values())
    if is_nested and not is_wrapped:
        return _rows_of_nested(value, columns, where)
    is_row = any(is_text(cell_of(value, name)) for name in columns.wanted)
    fields = [name for name, cell in value.items() if isinstance(cell, list) and cell]
    if is_wrapped:
        (outer, inner), *_ = value.items()
        fields = [
            f"{outer}.{name}" for name, cell in inner.items() if any(isinstance(row, dict) for row in cell)
        ]
        fields = fields or [outer]
    if fields and not is_row:
        raise ValueError(
            f"{where} is one object with the keys {', '.join(value)}; if its rows are in "
            f"{' or '.join(map(repr, fields))}, name that field (records_field={fields[0]!r}, --records-field "
            f"{fields[0]}); if it is one text, name its column (text_column, --text-column)"
        )
    return [value]


def _rows_of_split(names: Any, data: Any, where: str) -> list[Any]:
    """Return the rows of names of columns and lists of cells."""
    if (
        not isinstance(names, list)
        or not isinstance(data, list)
        or not all(isinstance(n, str) for n in names)
    ):
        raise ValueError(f"{where}: columns must be a list of names and data a list of rows")
    for number, row in enumerate(data, start=1):
        if not isinstance(row, list) or len(row) != len(names):
            raise ValueError(f"{where}, entry {number}: expected a list of {len(names)} cells as in columns")
    return [dict(zip(names, row, strict=True)) for row in data]


def _rows_of_nested(value: dict[str, dict[str, Any]], columns: Columns, where: str) -> list[Any]:
    """Return the rows of an object of objects: columns of cells by index, as pandas writes, or rows by index."""
    outer, inner = set(value), {name for cell in value.values() for name in cell}
    names = columns.wanted or TEXT_COLUMNS
    has_columns, has_rows = (any(name in keys for name in names) for keys in (outer, inner))
    if not has_columns and not has_rows:
        has_columns, has_rows = (all(map(str.isdecimal, keys)) for keys in (inner, outer))
    if has_columns == has_rows:
        raise ValueError(
            f"{where} is an object of objects, and it is not clear which names are those of columns; name the column "
            "with the texts (text_column, --text-column)"
        )
    if has_rows:
        return list(value.values())
    index = dict.fromkeys(name for column in value.values() for name in column)
    return [{name: column.get(row) for name, column in value.items()} for row in index]
