"""Rows of CSV and TSV: the header and the first rows show what separates and quotes cells."""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gpt2jax.data.columns import TEXT_COLUMNS
from gpt2jax.data.files import File
from gpt2jax.utils.notices import notice

DELIMITERS = ",;\t|"
# a header of words that one other mark separates, as awk and database clients write; a dot is a part of names
_OTHER_HEADER = re.compile(r"\w+([^\w\s.,;|\"'()-])\w+(?:\1\w+)*")
SAMPLE_LINES, SAMPLE_CHARACTERS = 200, 1 << 18
_EXCEL_LINE = re.compile(r'"?sep=(.)"?[,;\t|\s]*')  # Excel's own first line, which names the delimiter


@dataclass(frozen=True)
class _Dialect:
    """How cells are separated and quoted; `escape` is what stands before a quote within a quoted cell."""

    delimiter: str
    quote: str | None = '"'
    escape: str | None = None
    skips_space: bool = False

    def reader(self, lines: Iterable[str]) -> Any:
        return csv.reader(
            lines,
            delimiter=self.delimiter,
            quotechar=self.quote,
            quoting=csv.QUOTE_NONE if self.quote is None else csv.QUOTE_MINIMAL,
            escapechar=self.escape,
            skipinitialspace=self.skips_space,
            strict=True,
        )

    def describe(self) -> str:
        """Return the dialect in words."""
        quotes = "nothing" if self.quote is None else self.quote
        escape = f", with {self.escape} before a quote within" if self.escape else ""
        spaces = "; spaces after a separator are left out" if self.skips_space else ""
        return f"cells are separated by {self.delimiter!r} and quoted by {quotes}{escape}{spaces}"


def csv_rows(file: File) -> Iterator[tuple[str, Any]]:
    """Yield (place for messages, row) of a table whose first line names the columns.

    Raises:
        ValueError: a row has more or fewer cells than the header, a quote is never closed, or the header names a
            column twice; the message has the line.
    """
    # articles pass the default of 131072 characters
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 30))
    lines = itertools.dropwhile(lambda line: not line[1].strip(), file.lines())
    usual = "\t" if file.suffixes[0] == ".tsv" else ","
    sample, said = list(itertools.islice(lines, 1)), ""
    if sample and (excel := _EXCEL_LINE.fullmatch(sample[0][1].strip("\r\n"))):
        said, sample = excel[1], []
    size = 0
    for line in lines:
        sample.append(line)
        size += len(line[1])
        if len(sample) == SAMPLE_LINES or size > SAMPLE_CHARACTERS:
            break
    dialect = _find_dialect([line for _, line in sample], said or None, usual)
    if other := _other_dialect([line for _, line in sample], dialect):
        dialect = other
    if dialect != _Dialect(usual) and sample:
        notice(f"{file.name}: {dialect.describe()}")
    yield from _rows(file, itertools.chain(sample, lines), dialect)


def _find_dialect(sample: list[str], delimiter: str | None, usual: str) -> _Dialect:
    """Return the dialect by which the header has most cells and every row of the sample as many as the header."""
    counts = {mark: len(_first_row(_Dialect(mark), sample)) for mark in (usual, *DELIMITERS)}
    # the header says the delimiter; a column alone has none
    marks = [delimiter] if delimiter else [mark for mark, count in counts.items() if count > 1] or [usual]
    marks.sort(key=lambda mark: -counts.get(mark, 0))
    candidates = [dialect for mark in marks for dialect in _dialects(mark, sample)]
    return next((dialect for dialect in candidates if _fits(dialect, sample)), candidates[0])


def _other_dialect(sample: list[str], dialect: _Dialect) -> _Dialect | None:
    """Return the dialect of a header such as id^text, which none of `DELIMITERS` separates."""
    header = _first_row(dialect, sample)
    if len(header) != 1 or not (match := _OTHER_HEADER.fullmatch(header[0].strip())):
        return None
    other = _Dialect(match[1])
    names = _first_row(other, sample)
    return other if not {*TEXT_COLUMNS}.isdisjoint(names) or _fits(other, sample) else None


def _dialects(delimiter: str, sample: list[str]) -> list[_Dialect]:
    """Return the ways to quote that may be meant, the likeliest first."""
    plain, spaced = _Dialect(delimiter), _Dialect(delimiter, skips_space=True)
    header = _first_row(plain, sample)
    has_spaces = len(header) > 1 and all(cell.startswith(" ") for cell in header[1:])
    found = [spaced, plain] if has_spaces else [plain, spaced]
    found.append(_Dialect(delimiter, escape="\\"))
    text = "".join(sample)
    opens = r"(?:^|[{}]) ?{}".format(re.escape(delimiter), "{}")
    if re.search(opens.format("'"), text, re.MULTILINE) and not re.search(
        opens.format('"'), text, re.MULTILINE
    ):
        found.append(_Dialect(delimiter, quote="'"))
    if delimiter == "\t" and not _is_open(plain, sample):  # an open quote is an error rather than a letter
        found.append(_Dialect(delimiter, quote=None))
    return found


def _first_row(dialect: _Dialect, sample: list[str]) -> list[str]:
    try:
        return next(dialect.reader(sample), [])
    except csv.Error:
        return []


def _is_open(dialect: _Dialect, sample: list[str]) -> bool:
    try:
        list(dialect.reader(sample))
    except csv.Error as error:
        return "unexpected end" in str(error)
    return False


def _fits(dialect: _Dialect, sample: list[str]) -> bool:
    reader, header = dialect.reader(sample), None
    try:
        for cells in reader:
            header = header or cells
            if not _is_blank(cells, header) and len(cells) != len(header):
                return False
    except csv.Error as error:  # the sample may end inside a cell
        return "unexpected end" in str(error) and len(sample) == SAMPLE_LINES
    return True


def _is_blank(cells: list[str], header: list[str]) -> bool:
    return not cells or (len(cells) == 1 != len(header) and not cells[0].strip())


@dataclass
class _RowPlace:
    """Where the row that is being read begins, where its last quote opens, and how many characters it has."""

    first: int = 1
    opened: int = 1
    size: int = 0
    is_open: bool = False

    def add(self, number: int, line: str, quote: str | None) -> None:
        if not self.size:
            self.first = self.opened = number
            self.is_open = False
        self.size += len(line)
        quotes = line.count(quote) if quote else 0
        if quotes > self.is_open:  # one that does not close the open one
            self.opened = number
        self.is_open ^= bool(quotes % 2)


def _rows(file: File, lines: Iterable[tuple[int, str]], dialect: _Dialect) -> Iterator[tuple[str, Any]]:
    row = _RowPlace()

    def texts() -> Iterator[str]:
        for number, line in lines:
            row.add(number, line, dialect.quote)
            file.check_text_size(row.size)
            yield line

    reader, names = dialect.reader(texts()), None
    while True:
        row.size = 0
        try:
            cells = next(reader, None)
        except csv.Error as error:
            reason = str(error)
            is_open = "unexpected end" in reason and dialect.quote is not None
            hint = ": a quote opens here and is never closed" if is_open else ""
            place = row.opened if is_open else row.first
            raise ValueError(f"{file.name}, line {place}: {reason}{hint}") from None
        if cells is None:
            return
        place = f"{file.name}, line {row.first}"
        if names is None:
            names = _header(cells, place)
        elif not _is_blank(cells, names):
            if len(cells) != len(names):
                hint = f"; quote cells that hold {dialect.delimiter!r}" if len(cells) > len(names) else ""
                raise ValueError(
                    f"{place}: expected {len(names)} cells as in the header, got {len(cells)}{hint}"
                )
            yield place, dict(zip(names, cells, strict=True))


def _header(cells: list[str], place: str) -> list[str]:
    """Return the names of the columns; those without get one by their number."""
    names = [cell.strip() or f"column {number}" for number, cell in enumerate(cells, start=1)]
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise ValueError(f"{place}: the header has two columns {twice!r}; rename one of them")
    if len(names) == 1 and names[0] not in TEXT_COLUMNS:
        notice(f"{place}: taken for the header, so that the texts begin after {names[0]!r:.60}")
    return names
