"""Rows to texts: which column holds the text, or which two hold prompt and completion."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TEXT_COLUMNS = ("text", "article", "article_text", "content", "body", "document")
BATCH_ROWS = 1000  # rows of a table that are converted at once
PEEKED_ROWS = 100  # rows that may be read before the column of texts is clear

# a text, or {"prompt": ..., "completion": ...}
Item = str | dict[str, str]


@dataclass(frozen=True)
class Columns:
    """The columns that a caller asks for.

    Attributes:
        text: column with the texts. None: the first of `TEXT_COLUMNS` that the data has, or its only text column.
        pair: columns with prompts and completions, instead.
    """

    text: str | None = None
    pair: tuple[str, str] | None = None

    @property
    def wanted(self) -> tuple[str, ...]:
        """The columns that the caller named."""
        return self.pair or (() if self.text is None else (self.text,))

    def are_clear(self, columns: Mapping[str, bool]) -> bool:
        """Return True if more rows cannot change the choice."""
        names = self.wanted
        return (
            all(columns.get(name) for name in names)
            if names
            else any(columns.get(name) for name in TEXT_COLUMNS)
        )

    def choose(self, columns: Mapping[str, bool], where: str) -> tuple[str, ...]:
        """Return the names of the columns to read.

        Args:
            columns: name to whether the column holds texts.
            where: what messages call the data.

        Raises:
            ValueError: a column does not exist, or the choice is not clear; all columns are listed.
        """
        listing = ", ".join(
            f"{name if name.isprintable() else repr(name)}{'' if is_text else ' (not text)'}"
            for name, is_text in columns.items()
        )
        for name in self.wanted:
            if not columns.get(name):
                raise ValueError(f"{where} has no text column {name!r}; its columns: {listing}")
        if self.wanted:
            return self.wanted
        texts = [name for name, is_text in columns.items() if is_text]
        usual = [name for name in TEXT_COLUMNS if name in texts]
        if not usual and len(texts) != 1:
            raise ValueError(
                f"{where}: say which column holds the texts (text_column); its columns: {listing}"
            )
        return (usual[0] if usual else texts[0],)


def row_items(rows: Iterable[tuple[str, Any]], columns: Columns, where: str) -> Iterator[Item]:
    """Yield the texts or pairs of rows; a missing or null cell is an empty text.

    Args:
        rows: (place for messages, row); a row is a text, or a dict of cells.
        columns: chosen by the first rows, at most `PEEKED_ROWS`.
        where: what messages call the data.
    """
    rows = iter(rows)
    peeked: list[tuple[str, Any]] = []
    seen: dict[str, bool] = {}
    for place, row in rows:
        peeked.append((place, row))
        if not isinstance(row, dict):
            break
        for name, value in row.items():
            is_null = value is None and name in (*TEXT_COLUMNS, *columns.wanted)
            seen[name] = seen.get(name, False) or is_text(value) or is_null
        if columns.are_clear(seen) or len(peeked) == PEEKED_ROWS:
            break
    names = columns.choose(seen, where) if seen else None
    for place, row in itertools.chain(peeked, rows):
        if isinstance(row, str) and columns.pair is None:
            yield row
            continue
        if not isinstance(row, dict):
            raise ValueError(f"{place}: a text or an object is expected, not {type(row).__name__}")
        if names is None:
            names = columns.choose({name: is_text(value) for name, value in row.items()}, place)
        yield to_item([row.get(name) for name in names], names, place)


def table_items(table: Any, columns: Columns, where: str) -> Iterator[Item]:
    """Yield the texts or pairs of a `Dataset` or `IterableDataset`; only their columns are read."""
    table = table.with_format(None)
    if table.features is None:  # a stream after `map` knows its columns only row by row
        yield from row_items(
            ((f"{where}, row {number}", row) for number, row in enumerate(table, start=1)), columns, where
        )
        return
    names = columns.choose(_text_columns(table.features.arrow_schema), where)
    row = 0
    for batch in table.select_columns(list(names)).iter(BATCH_ROWS):
        for cells in zip(*(batch[name] for name in names), strict=True):
            row += 1
            yield to_item(cells, names, f"{where}, row {row}")


def _text_columns(schema: Any) -> dict[str, bool]:
    """Return for each column of an Arrow schema whether it holds strings or lists of strings."""
    import pyarrow.types as kinds

    def is_string(kind: Any) -> bool:
        return kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)

    def is_list(kind: Any) -> bool:
        return (kinds.is_list(kind) or kinds.is_large_list(kind)) and is_string(kind.value_type)

    return {field.name: is_string(field.type) or is_list(field.type) for field in schema}


def to_item(cells: Sequence[Any], names: Sequence[str], place: str) -> Item:
    """Return the text of one cell, or the pair of two; null is "", a list of sentences has one a line.

    scientific_papers stores articles as lists of sentences.
    """
    for cell, name in zip(cells, names, strict=True):
        if not (cell is None or is_text(cell)):
            raise ValueError(f"{place}: column {name!r} holds {type(cell).__name__}, not text")
    texts = [
        cell if isinstance(cell, str) else "\n".join(part or "" for part in cell or ()) for cell in cells
    ]
    return texts[0] if len(texts) == 1 else {"prompt": texts[0], "completion": texts[1]}


def is_text(value: Any) -> bool:
    """Return True for a string or a list of strings and nulls."""
    return isinstance(value, str) or (
        isinstance(value, list) and all(part is None or isinstance(part, str) for part in value)
    )
