"""Rows to texts: which column holds the text, or which two hold prompt and completion."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpt2jax.utils.notices import enumerate_names, notice, printable

TEXT_COLUMNS = ("text", "article", "article_text", "content", "body", "document")
BATCH_ROWS = 1000  # rows of a table that are converted at once
PEEKED_ROWS = 100  # rows that may be read before the column of texts is clear
SEARCHED_ROWS = 100_000  # the same for a column that the caller names, of which no other cell is kept

# a text, or {"prompt": ..., "completion": ...}
Item = str | dict[str, str]


@dataclass(frozen=True)
class Columns:
    """The columns that a caller asks for.

    Attributes:
        text: column with the texts, "outer.inner" for a field of a column of objects. None: the first of
            `TEXT_COLUMNS` that the data has, or its only text column.
        pair: columns with prompts and completions, instead.
    """

    text: str | None = None
    pair: tuple[str, str] | None = None
    # of several files: the columns of the first one, () for plain text, and its name
    _first: list[tuple[tuple[str, ...], str]] | None = dataclasses.field(default=None, compare=False)
    # all columns of the rows that the choice was made from
    seen: set[str] = dataclasses.field(default_factory=set, compare=False)

    @property
    def wanted(self) -> tuple[str, ...]:
        """The columns that the caller named."""
        return self.pair or (() if self.text is None else (self.text,))

    def for_files(self) -> Columns:
        """Return the same columns for files of one data set, which must all have their texts in the same column."""
        return dataclasses.replace(self, _first=[])

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
            ValueError: a column does not exist, the choice is not clear, or it differs from that of the file before;
                all columns are listed.
        """
        self.seen.update(columns)
        listing = ", ".join(
            f"{name if name == printable(name) else repr(name)}{'' if is_text else ' (not text)'}"
            for name, is_text in columns.items()
        )
        if not columns:
            raise ValueError(f"{where} has no columns")
        for name in self.wanted:
            if not columns.get(name):
                raise ValueError(f"{where} has no text column {name!r}; its columns: {listing}")
        if self.wanted:
            return self.wanted
        texts = [name for name, is_text in columns.items() if is_text]
        # a field within an object counts if no column is a text itself
        texts = [name for name in texts if name.rpartition(".")[0] not in columns] or texts
        usual = [name for name in TEXT_COLUMNS if name in texts]
        if not usual and len(texts) != 1:
            raise ValueError(
                f"{where}: say which column holds the texts (text_column, --text-column); its columns: {listing}"
            )
        names = (usual[0] if usual else texts[0],)
        others = [name for name in texts if name not in names]
        if others and "section_names" not in columns:  # scientific_papers, whose articles are meant
            listing = enumerate_names([printable(name) for name in others])
            notice(
                f"the texts are those of column {names[0]!r}, not {listing}; text_column (--text-column) takes another"
            )
        self.note(names, where)
        return names

    def note(self, names: tuple[str, ...], where: str) -> None:
        """Compare the columns of a file with those of the first file; plain text has no columns.

        Raises:
            ValueError: they differ, such as in a file that describes the others. Plain text and a column of
                `TEXT_COLUMNS` may be mixed.
        """
        if self._first is None:
            return
        if not self._first:
            self._first.append((names, where))
        before, place = self._first[0]
        is_mixed = not names or not before
        if names == before or (is_mixed and set(TEXT_COLUMNS).issuperset((*names, *before))):
            return
        here, there = ((f"column {cols[0]!r}" if cols else "plain text") for cols in (names, before))
        raise ValueError(
            f"{where} has its texts in another place ({here}) than {place} ({there}); name the files to read one by "
            "one or by a pattern such as FOLDER/*.jsonl, or their column (text_column, --text-column)"
        )


def row_items(rows: Iterable[tuple[str, Any]], columns: Columns, where: str) -> Iterator[Item]:
    """Yield the texts or pairs of rows; a missing or null cell or row is an empty text.

    Args:
        rows: (place for messages, row); a row is a text, a dict of cells, or None.
        columns: chosen by the first rows, at most `PEEKED_ROWS`, or `SEARCHED_ROWS` for those that the caller named.
        where: what messages call the data.
    """
    rows = iter(rows)
    peeked: list[tuple[str, Any]] = []
    seen: dict[str, bool] = {}
    for place, row in rows:
        peeked.append((place, row))
        if row is None:
            continue
        if not isinstance(row, dict):
            break
        for name, value in _named_cells(row):
            is_null = value is None and name in (*TEXT_COLUMNS, *columns.wanted)
            seen[name] = seen.get(name, False) or is_text(value) or is_null
        if columns.are_clear(seen) or len(peeked) == (SEARCHED_ROWS if columns.wanted else PEEKED_ROWS):
            break
        if columns.wanted:
            peeked[-1] = place, {name: cell_of(row, name) for name in columns.wanted}
    names = columns.choose(seen, where) if seen else None
    for place, row in itertools.chain(peeked, rows):
        if isinstance(row, str) and columns.pair is None:
            yield row
            continue
        if row is None:
            yield to_item([None] * len(columns.wanted or ("text",)), columns.wanted or ("text",), place)
            continue
        if not isinstance(row, dict):
            raise ValueError(f"{place}: a text or an object is expected, not {type(row).__name__}")
        names = names or columns.choose({name: is_text(value) for name, value in _named_cells(row)}, place)
        if not columns.wanted:
            _refuse_other_column(row, names[0], place)
        yield to_item([cell_of(row, name) for name in names], names, place)


def _refuse_other_column(row: Mapping[str, Any], name: str, place: str) -> None:
    """Raise ValueError for a row with its text in another usual column than the rows before."""
    if name in row or cell_of(row, name) is not None:
        return
    other = next((other for other in TEXT_COLUMNS if row.get(other) and is_text(row[other])), None)
    if other is not None:
        raise ValueError(
            f"{place}: the row has no column {name!r} as those before, but {other!r}; give the column one name in all "
            "rows, or name the column to read (text_column, --text-column)"
        )


def _named_cells(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, cell) of a row, those of objects within it as "outer.inner"."""
    for name, cell in row.items():
        yield name, cell
        if isinstance(cell, dict):
            yield from ((f"{name}.{inner}", value) for inner, value in _named_cells(cell))


def cell_of(row: Mapping[str, Any], name: str) -> Any:
    """Return a cell by its name, by "outer.inner" if it is in an object within the row; None if it is absent."""
    if name in row or "." not in name:
        return row.get(name)
    outer, _, inner = name.partition(".")
    within = row.get(outer)
    return cell_of(within, inner) if isinstance(within, Mapping) else None


def table_items(table: Any, columns: Columns, where: str) -> Iterator[Item]:
    """Yield the texts or pairs of a `Dataset` or `IterableDataset`; only their columns are read."""
    table = table.with_format(None)
    if table.features is None:  # a stream after `map` knows its columns only row by row
        yield from row_items(
            ((f"{where}, row {number}", row) for number, row in enumerate(table, start=1)), columns, where
        )
        return
    names = columns.choose(column_kinds(table.features.arrow_schema, columns.wanted), where)
    roots = [name if name in table.features else name.partition(".")[0] for name in names]
    row = 0
    for batch in table.select_columns(list(dict.fromkeys(roots))).iter(BATCH_ROWS):
        for cells in zip(*(batch[root] for root in roots), strict=True):
            row += 1
            cells = [
                cell_of({root: cell}, name) for root, cell, name in zip(roots, cells, names, strict=True)
            ]
            yield to_item(cells, names, f"{where}, row {row}")


def column_kinds(schema: Any, wanted: Sequence[str] = ()) -> dict[str, bool]:
    """Return for each column of an Arrow schema whether it holds texts or lists of texts.

    Fields of columns of objects are "outer.inner". Bytes and columns of nulls count as texts if their name is
    one of `TEXT_COLUMNS` or wanted: other bytes may be pictures.
    """
    import pyarrow.types as kinds

    def is_string(kind: Any, name: str) -> bool:
        kind = getattr(kind, "storage_type", kind)
        if kinds.is_dictionary(kind):
            kind = kind.value_type
        if kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind):
            return True
        is_bytes = any(
            test(kind)
            for test in (kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view, kinds.is_null)
        )
        return is_bytes and name in (*TEXT_COLUMNS, *wanted)

    def is_list(kind: Any) -> bool:
        tests = (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list, kinds.is_list_view)
        return any(test(kind) for test in (*tests, kinds.is_large_list_view))

    found: dict[str, bool] = {}

    def add(field: Any, prefix: str) -> None:
        name, kind = prefix + field.name, field.type
        found[name] = is_string(kind.value_type if is_list(kind) else kind, name)
        if kinds.is_struct(kind):
            for inner in kind:
                add(inner, f"{name}.")

    for field in schema:
        add(field, "")
    return found


def to_item(cells: Sequence[Any], names: Sequence[str], place: str) -> Item:
    """Return the text of one cell, or the pair of two; null is "", a list of sentences has one a line.

    scientific_papers stores articles as lists of sentences. Bytes, as some writers of Parquet store texts, are UTF-8.
    """
    texts = [_to_text(cell, name, place) for cell, name in zip(cells, names, strict=True)]
    return texts[0] if len(texts) == 1 else {"prompt": texts[0], "completion": texts[1]}


def _to_text(cell: Any, name: str, place: str) -> str:
    if isinstance(cell, str):
        return cell
    if isinstance(cell, bytes):
        try:
            return cell.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: column {name!r} holds bytes that are not UTF-8: {error}") from None
    if isinstance(cell, list):
        cell = ["" if part is None else part for part in cell]
        parts = [_to_text(part, name, place) if isinstance(part, bytes) else part for part in cell]
        if all(isinstance(part, str) for part in parts):
            return "\n".join(parts)
    if cell is not None:
        raise ValueError(f"{place}: column {name!r} holds {type(cell).__name__}, not text")
    return ""


def is_text(value: Any) -> bool:
    """Return True for a string or a list of strings and nulls."""
    return isinstance(value, str) or (
        isinstance(value, list) and all(part is None or isinstance(part, str) for part in value)
    )
