"""Texts out of files, one format each, read as a stream: nothing is held that is not asked for."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gpt2jax.tokenizer.bpe import END_TOKEN

DOCUMENTS = ("file", "paragraph", "line")
TEXT_COLUMNS = ("text", "article", "article_text", "content", "body", "document")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True)
class File:
    """A file to read: on the disk or inside a zip archive.

    Attributes:
        name: what messages call it.
        path: where it stands inside the folder or archive it was found in, with "/".
        open: opens it for reading bytes, after decompression.
    """

    name: str
    path: str
    open: Callable[[], IO[bytes]]

    @property
    def format(self) -> str:
        """The extension that tells the format, in lower case, without that of a compression."""
        suffixes = [suffix.lower() for suffix in Path(self.path).suffixes[-2:]]
        if suffixes and suffixes[-1] in COMPRESSIONS:
            suffixes.pop()
        return suffixes[-1] if suffixes else ""


def list_files(path: Path) -> list[File]:
    """The file at a path, or those of a known format in a folder or a zip archive, sorted.

    Raises:
        ValueError: the format is unknown, or nothing in the folder has a known one.
    """
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        files = [_disk_file(file, file.relative_to(path).as_posix()) for file in inside]
    elif path.suffix.lower() == ".zip":
        files = _zip_files(path)
    else:
        file = _disk_file(path, path.name)
        if file.format not in READERS:
            raise ValueError(f"{path}: unknown format {file.format or 'without an extension'!r}; {_known()}")
        return [file]
    hidden = re.compile(r"(^|/)(\.|__MACOSX/|(README|dataset_infos?\.json)[^/]*$)")
    files = [file for file in files if file.format in READERS and not hidden.search(file.path)]
    if not files:
        raise ValueError(f"{path} holds no file of a known format; {_known()}")
    return files


def read_texts(file: File, text_column: str | None = None, documents: str = "file") -> Iterator[str]:
    """The texts of a file, in order. `documents` says what a text is where the format does not: in .txt
    files.

    Raises:
        ValueError: the content is not what the extension says, or the column to read is not clear.
    """
    try:
        yield from READERS[file.format](file, text_column, documents)
    except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the system's, not a decompressor's
            raise
        raise ValueError(f"{file.name} is damaged: {error}") from error


def choose_column(columns: Mapping[str, bool], wanted: str | None, where: str) -> str:
    """The column with the texts.

    Args:
        columns: name to whether the column holds texts.
        wanted: the caller's choice. None: the first of `TEXT_COLUMNS` that is there, or the only one with
            texts.
        where: what messages call the data.

    Raises:
        ValueError: the column is not there, or the choice is not clear; all columns are listed.
    """
    listing = ", ".join(f"{name}{'' if is_text else ' (not text)'}" for name, is_text in columns.items())
    if wanted is not None:
        if not columns.get(wanted, False):
            raise ValueError(f"{where} has no text column {wanted!r}; its columns: {listing}")
        return wanted
    texts = [name for name, is_text in columns.items() if is_text]
    usual = [name for name in TEXT_COLUMNS if name in texts]
    if not usual and len(texts) != 1:
        raise ValueError(f"{where}: say which column holds the texts (text_column); its columns: {listing}")
    return usual[0] if usual else texts[0]


def schema_columns(schema: Any) -> dict[str, bool]:
    """The columns of an Arrow schema, and whether each holds strings or lists of strings."""
    import pyarrow.types as kinds

    def is_text(kind: Any) -> bool:
        return kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)

    def is_texts(kind: Any) -> bool:
        return (kinds.is_list(kind) or kinds.is_large_list(kind)) and is_text(kind.value_type)

    return {field.name: is_text(field.type) or is_texts(field.type) for field in schema}


def row_texts(rows: Iterable[tuple[str, Any]], text_column: str | None, where: str) -> Iterator[str]:
    """The texts of rows.

    Args:
        rows: (place for messages, row): a row is a string, or a dict of columns.
        text_column: see `choose_column`; chosen by the first row.
        where: what messages call the data.
    """
    column = None
    for place, row in rows:
        if isinstance(row, str):
            yield row
            continue
        if not isinstance(row, dict):
            raise ValueError(f"{place}: a text or an object is expected, not {type(row).__name__}")
        if column is None:
            columns = {
                str(name): _is_text(value) or (value is None and name in (*TEXT_COLUMNS, text_column))
                for name, value in row.items()
            }
            column = choose_column(columns, text_column, where)
        if column not in row:
            raise ValueError(f"{place}: no column {column!r}; its columns: {', '.join(map(str, row))}")
        if not (_is_text(row[column]) or row[column] is None):
            raise ValueError(f"{place}: column {column!r} holds {type(row[column]).__name__}, not text")
        yield as_text(row[column])


def as_text(value: str | list[str] | None) -> str:
    """A text: lists of sentences one a line, as `scientific_papers` joins them; "" where there is none."""
    return value if isinstance(value, str) else "\n".join(value or ())


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _read_txt(file: File, text_column: str | None, documents: str) -> Iterator[str]:
    lines = _lines(file)
    start = list(itertools.islice(lines, 1))
    while start and not start[-1][1].strip():  # blank lines tell nothing
        following = list(itertools.islice(lines, 1))
        if not following:
            break
        start += following
    lines = itertools.chain(start, lines)
    if start and _is_json_object(start[-1][1]):  # files of scientific_papers: JSON lines named .txt
        yield from row_texts(_json_lines(file, lines), text_column, file.name)
    elif text_column is not None:
        raise ValueError(f"{file.name} is plain text: it has no column {text_column!r}")
    elif documents == "line":
        yield from (line.rstrip("\r\n") for _, line in lines if line.strip())
    else:
        yield from _plain_documents((line.replace("\r\n", "\n") for _, line in lines), documents)


def _plain_documents(lines: Iterable[str], documents: str) -> Iterator[str]:
    """Pieces between end tokens, and between blank lines for paragraphs; blank ones left out."""
    parts: list[str] = []

    def piece() -> Iterator[str]:
        text = "".join(parts)
        parts.clear()
        if text.strip():
            yield text.strip("\n") if documents == "paragraph" else text

    for line in lines:
        if documents == "paragraph" and not line.strip():
            yield from piece()
        while END_TOKEN in line:
            before, _, line = line.partition(END_TOKEN)
            parts.append(before)
            yield from piece()
            line = line.removeprefix("\n")
        parts.append(line)
    yield from piece()


def _read_jsonl(file: File, text_column: str | None, documents: str) -> Iterator[str]:
    return row_texts(_json_lines(file, _lines(file)), text_column, file.name)


def _read_json(file: File, text_column: str | None, documents: str) -> Iterator[str]:
    """An array of texts or objects, an object of columns, or JSON lines, which many name .json."""
    lines = _lines(file)
    start = list(itertools.islice((line for line in lines if line[1].strip()), 2))
    lines = itertools.chain(start, lines)
    if len(start) == 2 and _is_json_object(start[0][1]):
        return row_texts(_json_lines(file, lines), text_column, file.name)
    try:
        value = json.loads("".join(line for _, line in lines) or "[]")
    except ValueError as error:
        raise ValueError(f"{file.name} is not JSON: {error}") from None
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        column = choose_column(
            {name: _is_text(texts) for name, texts in value.items()}, text_column, file.name
        )
        return iter(value[column])
    rows = value if isinstance(value, list) else [value]
    numbered = ((f"{file.name}, entry {number}", row) for number, row in enumerate(rows, start=1))
    return row_texts(numbered, text_column, file.name)


def _read_csv(file: File, text_column: str | None, documents: str) -> Iterator[str]:
    """A table whose first line names the columns."""
    csv.field_size_limit(
        max(csv.field_size_limit(), 1 << 30)
    )  # articles pass the default of 131072 characters
    delimiter = "\t" if file.format == ".tsv" else ","
    reader = csv.DictReader((line for _, line in _lines(file)), delimiter=delimiter, strict=True)
    rows = ((f"{file.name}, line {reader.line_num}", row) for row in reader)
    try:
        yield from row_texts(rows, text_column, file.name)
    except csv.Error as error:
        raise ValueError(f"{file.name}, line {reader.line_num}: {error}") from None


def _read_parquet(file: File, text_column: str | None, documents: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    with file.open() as stream:
        try:
            # Parquet is read from its end: what cannot be searched is held whole.
            table = pyarrow.parquet.ParquetFile(stream if stream.seekable() else io.BytesIO(stream.read()))
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{file.name} is not a Parquet file: {str(error).splitlines()[0]}") from None
        column = choose_column(schema_columns(table.schema_arrow), text_column, file.name)
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            yield from map(as_text, batch.column(0).to_pylist())


READERS: dict[str, Callable[[File, str | None, str], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def _known() -> str:
    return f"known are {', '.join(READERS)}, each also with {', '.join(COMPRESSIONS)}, and .zip of such files"


def _lines(file: File) -> Iterator[tuple[int, str]]:
    """(number, line with its end) of a file in UTF-8."""
    offset = 0
    with file.open() as stream:
        for number, raw in enumerate(stream, start=1):
            if number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise ValueError(f"{file.name} is UTF-16 by its first bytes: convert it to UTF-8")
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                place = offset + error.start + (3 if number == 1 and raw.startswith(b"\xef\xbb\xbf") else 0)
                wrong = f"byte 0x{error.object[error.start]:02x} at offset {place} (line {number})"
                raise ValueError(f"{file.name} is not UTF-8: {wrong}; convert it") from None
            offset += len(raw)
            yield number, line


def _json_lines(file: File, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[str, Any]]:
    for number, line in lines:
        if not line.strip():
            continue
        place = f"{file.name}, line {number}"
        try:
            yield place, json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place} is not JSON: {error}") from None


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _disk_file(path: Path, relative: str) -> File:
    return File(str(path), relative, lambda: _decompress(path, path.suffix.lower()))


def _zip_files(path: Path) -> list[File]:
    def opener(name: str) -> Callable[[], IO[bytes]]:
        return lambda: _decompress(zipfile.ZipFile(path).open(name), Path(name).suffix.lower())

    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(entry.filename for entry in archive.infolist() if not entry.is_dir())
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a zip archive: {error}") from None
    return [File(f"{path}:{name}", name, opener(name)) for name in names]


def _decompress(source: Path | IO[bytes], suffix: str) -> Any:
    """Open a file, or what is inside an open one, for reading bytes."""
    if suffix == ".gz":
        return gzip.open(source)
    if suffix == ".bz2":
        return bz2.open(source)
    if suffix == ".xz":
        return lzma.open(source)
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(source, compression="zstd"))  # type: ignore[arg-type]
    return open(source, "rb") if isinstance(source, Path) else source
