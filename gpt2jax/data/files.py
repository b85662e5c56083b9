"""Files of texts: found, opened and read as a stream, on this machine, in zip archives and on the hub.

fsspec opens and unpacks them, as it does for `datasets`; tables (Parquet, Arrow) are read by `datasets` itself. Rows
of JSON and CSV go through Python's own parsers, because those of `datasets` guess types and change texts: "2020-01-01"
becomes a time, "NA" and "null" become nothing, "007" a number, an object of columns one single row, and a CSV row
with a cell too many loses its first cell, all without an error (datasets 5.2). They name no line either.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import io
import itertools
import json
import lzma
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

from gpt2jax.data.columns import Columns, Item, row_items, table_items
from gpt2jax.tokenizer.bpe import END_TOKEN

DOCUMENTS = ("file", "paragraph", "line")
# extension to the reader's name in `datasets` (tables), or to None
FORMATS = {
    **dict.fromkeys((".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")),
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
# extension to fsspec's name; its own reader of .zst needs a package that nothing here requires, pyarrow has one
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": None}

_KNOWN = f"known are {', '.join(FORMATS)}, each also with {', '.join(COMPRESSIONS)}, and .zip of such files"
_NOT_DATA = re.compile(r"(^|/)(\.|__MACOSX/|(README|dataset_infos?\.json)[^/]*$)")


@dataclass(frozen=True)
class File:
    """A file to read.

    Attributes:
        name: what messages call it.
        path: its place inside the folder or archive that it was found in, with "/".
        system: the fsspec file system that opens it.
        place: its name there.
        url: the same for `datasets`.
    """

    name: str
    path: str
    system: Any
    place: str
    url: str

    @property
    def suffixes(self) -> tuple[str, str]:
        """The extension of the format and that of the compression, in lower case; "" if it has none."""
        *_, last = ["", *(suffix.lower() for suffix in PurePosixPath(self.path).suffixes)]
        if last not in COMPRESSIONS:
            return last, ""
        return PurePosixPath(self.path).with_suffix("").suffix.lower(), last

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open the file for reading bytes, unpacked."""
        from fsspec.core import OpenFile

        compression = self.suffixes[1]
        with OpenFile(self.system, self.place, "rb", COMPRESSIONS.get(compression)) as stream:
            if compression == ".zst":
                import pyarrow

                unpacked: Any = pyarrow.input_stream(stream, compression="zstd")
                stream = io.BufferedReader(unpacked)
            yield stream

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield (number, line with its end) of a file in UTF-8."""
        offset = 0
        with self.open() as stream:
            for number, raw in enumerate(stream, start=1):
                if number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise ValueError(f"{self.name} is UTF-16 by its first bytes: convert it to UTF-8")
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    start = offset + error.start + (3 if number == 1 and raw[:3] == b"\xef\xbb\xbf" else 0)
                    wrong = f"byte 0x{error.object[error.start]:02x} at offset {start} (line {number})"
                    raise ValueError(f"{self.name} is not UTF-8: {wrong}; convert it") from None
                offset += len(raw)
                yield number, line


def list_files(source: str) -> list[File]:
    """Return the file at a path or `hf://` path, or those of known formats in a folder or zip archive, sorted.

    Raises:
        ValueError: the format is unknown, or nothing in the folder has a known one.
        FileNotFoundError: there is no such file or folder on the hub.
    """
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem
    from fsspec.implementations.zip import ZipFileSystem

    is_archive, is_remote = source.lower().endswith(".zip") and not os.path.isdir(source), "://" in source
    try:
        if is_archive and not is_remote:
            system, root = ZipFileSystem(source), ""
        elif is_remote:
            system, root = url_to_fs(f"zip://::{source}" if is_archive else source)
        else:
            system, root = LocalFileSystem(), os.path.abspath(source)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{source} is not a zip archive: {error}") from None

    def as_file(place: str) -> File:
        path = place.removeprefix(root).lstrip("/")
        url = system.unstrip_protocol(place) if is_remote else place
        separator = ":" if is_archive else "/"
        return File(
            f"{source.rstrip('/')}{separator}{path}" if path else source,
            path or PurePosixPath(place).name,
            system,
            place,
            f"zip://{place}::{source}" if is_archive else url,
        )

    if system.info(root)["type"] != "directory":
        file = as_file(root)
        if file.suffixes[0] not in FORMATS:
            found = file.suffixes[0] or "without an extension"
            raise ValueError(f"{source}: unknown format {found!r}; {_KNOWN}")
        return [file]
    files = [as_file(place) for place in system.find(root)]
    files = [file for file in files if file.suffixes[0] in FORMATS and not _NOT_DATA.search(file.path)]
    if not files:
        raise ValueError(f"{source} holds no file of a known format; {_KNOWN}")
    return sorted(files, key=lambda file: file.path.split("/"))


def read_items(file: File, columns: Columns, documents: str = "file") -> Iterator[Item]:
    """Yield the texts or pairs of a file, in order.

    Args:
        file: what to read.
        columns: which columns.
        documents: what a text is in plain .txt files, see `gpt2jax.data.sources.Texts`.

    Raises:
        ValueError: the content is not what the extension says, or the column to read is not clear.
    """
    suffix = file.suffixes[0]
    try:
        if FORMATS[suffix] is not None:
            yield from _table_file_items(file, columns)
        elif suffix == ".txt":
            yield from _text_file_items(file, columns, documents)
        elif suffix in (".csv", ".tsv"):
            yield from row_items(_csv_rows(file), columns, file.name)
        else:
            yield from row_items(_json_rows(file), columns, file.name)
    except (
        RuntimeError
    ) as error:  # of zipfile: a password, or a method of compression that Python does not know
        raise ValueError(f"{file.name} can't be unpacked: {error}") from error
    except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the system's, not a decompressor's
            raise
        raise ValueError(f"{file.name} is damaged: {error}") from error


def _text_file_items(file: File, columns: Columns, documents: str) -> Iterator[Item]:
    lines = file.lines()
    start = []
    for line in lines:
        start.append(line)
        if line[1].strip():  # blank lines say nothing about the content
            break
    lines = itertools.chain(start, lines)
    if start and _is_json(start[-1][1], dict):  # scientific_papers names its JSON lines .txt
        yield from row_items(_json_lines(file, lines), columns, file.name)
    elif columns.wanted:
        raise ValueError(f"{file.name} is plain text: it has no column {columns.wanted[0]!r}")
    elif documents == "line":
        yield from (line.rstrip("\r\n") for _, line in lines if line.strip())
    else:
        yield from _plain_documents((line.replace("\r\n", "\n") for _, line in lines), documents)


def _plain_documents(lines: Iterable[str], documents: str) -> Iterator[str]:
    """Yield what stands between end tokens, for paragraphs between blank lines too; blank texts are left out."""
    parts: list[str] = []

    def finish() -> Iterator[str]:
        text = "".join(parts)
        parts.clear()
        if text.strip():
            yield text.strip("\n") if documents == "paragraph" else text

    for line in lines:
        if documents == "paragraph" and not line.strip():
            yield from finish()
        while END_TOKEN in line:
            before, _, line = line.partition(END_TOKEN)
            parts.append(before)
            yield from finish()
            line = line.removeprefix("\n")
        parts.append(line)
    yield from finish()


def _json_rows(file: File) -> Iterator[tuple[str, Any]]:
    """Yield the rows of JSON lines, of an array, or of an object of columns, whatever the extension."""
    lines = file.lines()
    start = list(itertools.islice((line for line in lines if line[1].strip()), 2))
    lines = itertools.chain(start, lines)
    if not start:
        return iter(())
    is_array = start[0][1].lstrip().startswith("[")
    if (len(start) == 2 and _is_json(start[0][1], dict | str)) or (
        file.suffixes[0] != ".json" and not is_array
    ):
        return _json_lines(file, lines)
    try:
        value = json.loads("".join(line for _, line in lines))
    except ValueError as error:
        raise ValueError(f"{file.name} is not JSON: {error}") from None
    if isinstance(value, dict):
        value = _rows_of_object(value, file.name)
    rows = value if isinstance(value, list) else [value]
    return ((f"{file.name}, entry {number}", row) for number, row in enumerate(rows, start=1))


def _rows_of_object(value: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the rows of an object of columns, or of an object that is one row."""
    cells = list(value.values())
    if cells and all(isinstance(column, list) for column in cells):
        if len(set(map(len, cells))) > 1:
            raise ValueError(f"{where} has columns of different lengths")
        return [dict(zip(value, row, strict=True)) for row in zip(*cells, strict=True)]
    if any(isinstance(cell, list) and cell and isinstance(cell[0], dict) for cell in cells):
        raise ValueError(
            f"{where} is one object with the keys {', '.join(value)}; expected an array of rows, or an object of "
            "columns"
        )
    return [value]


def _json_lines(file: File, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[str, Any]]:
    for number, line in lines:
        if not line.strip():
            continue
        place = f"{file.name}, line {number}"
        try:
            yield place, json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place} is not JSON: {error}") from None


def _is_json(line: str, kind: Any) -> bool:
    try:
        return isinstance(json.loads(line), kind)
    except ValueError:
        return False


def _csv_rows(file: File) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a table whose first line names the columns and thereby shows the delimiter."""
    # articles pass the default of 131072 characters
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 30))
    lines = itertools.dropwhile(lambda line: not line[1].strip(), file.lines())
    first, header = next(lines, (1, ""))
    delimiter = "\t" if file.suffixes[0] == ".tsv" else max(",;\t|", key=header.count)
    texts = itertools.chain([header], (line for _, line in lines))
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    place, names = file.name, None
    try:
        while True:
            place = f"{file.name}, line {reader.line_num + first}"
            cells = next(reader, None)
            if cells is None:
                return
            if not cells:  # a blank line
                continue
            if names is None:
                names = cells
                continue
            if len(cells) != len(names):
                raise ValueError(f"{place}: expected {len(names)} cells as in the header, got {len(cells)}")
            yield place, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"{place}: {error}") from None


def _table_file_items(file: File, columns: Columns) -> Iterator[Item]:
    """Yield the texts or pairs of a Parquet or Arrow file, which `datasets` reads without a copy of its own."""
    import datasets
    import pyarrow

    kind, compression = FORMATS[file.suffixes[0]], file.suffixes[1]
    with contextlib.ExitStack() as stack:
        url = glob.escape(file.url)  # `datasets` takes patterns
        # tables are read from their end, which a compressed stream does not give; "::" joins parts of an URL
        if compression or "::" in file.place:
            plain = stack.enter_context(tempfile.NamedTemporaryFile(suffix=f".{kind}"))
            with file.open() as stream:
                shutil.copyfileobj(stream, plain)
            plain.flush()
            url = plain.name
        verbosity = datasets.logging.get_verbosity()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises
        stack.callback(datasets.logging.set_verbosity, verbosity)
        try:
            table = datasets.load_dataset(kind, data_files=[url], streaming=True, split="train")
        except pyarrow.ArrowException as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{file.name} is not a file of {str(kind).title()}: {reason}") from None
        try:
            yield from table_items(table, columns, file.name)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{file.name} is damaged: {str(error).splitlines()[0]}") from None
