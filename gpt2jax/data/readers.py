"""Texts of a file of any known format: plain text, JSON, CSV and tables."""

from __future__ import annotations

import errno
import io
import itertools
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator

from gpt2jax.data.arrow_files import arrow_items
from gpt2jax.data.columns import Columns, Item, row_items
from gpt2jax.data.csv_rows import csv_rows
from gpt2jax.data.files import PLAIN, TABLES, File
from gpt2jax.data.json_rows import is_json_object, json_lines, json_rows
from gpt2jax.tokenizer.bpe import END_TOKEN


def read_items(
    file: File, columns: Columns, documents: str = "file", records_field: str | None = None
) -> Iterator[Item]:
    """Yield the texts or pairs of a file, in order.

    Args:
        file: what to read.
        columns: which columns.
        documents: what a text is in files of plain text, see `gpt2jax.data.sources.Texts`.
        records_field: the field of a JSON object that holds the rows.

    Raises:
        ValueError: the content is not what the extension says, or the column to read is not clear.
    """
    suffix = file.suffixes[0]
    try:
        if suffix in TABLES:
            yield from arrow_items(file, columns)
        elif suffix in PLAIN:
            yield from _plain_items(file, columns, documents)
        elif suffix in (".csv", ".tsv"):
            yield from row_items(csv_rows(file), columns, file.name)
        else:
            yield from row_items(json_rows(file, columns, records_field), columns, file.name)
    except RuntimeError as error:
        # of zipfile: a password, or a method of compression that Python does not know
        raise ValueError(f"{file.name} can't be unpacked: {error}") from error
    except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, OSError) as error:
        number = getattr(error, "errno", None)
        if number is not None and number != errno.EINVAL:  # the system's, not a decompressor's
            raise OSError(number, os.strerror(number), file.name) from error
        raise ValueError(f"{file.name} is damaged: {error}") from error
    except ValueError as error:
        if file.suffixes[1] and not file.is_packed():
            reason = f"it is not compressed, as {file.suffixes[1]} says, and {error}"
            raise ValueError(f"{file.name} is damaged: {reason}") from None
        raise


def _plain_items(file: File, columns: Columns, documents: str) -> Iterator[Item]:
    lines = file.lines()
    start = []
    for line in lines:
        start.append(line)
        if line[1].strip():  # blank lines say nothing about the content
            break
    lines = itertools.chain(start, lines)
    if start and file.suffixes[0] == ".txt" and is_json_object(start[-1][1]):
        # scientific_papers names its JSON lines .txt
        yield from row_items(json_lines(file, lines), columns, file.name)
        return
    if columns.wanted:
        raise ValueError(f"{file.name} is plain text: it has no column {columns.wanted[0]!r}")
    columns.note((), file.name)
    if documents == "line":
        yield from (line.rstrip("\r\n") for _, line in lines if line.strip())
    else:
        yield from _plain_documents(file, (_end_in_newline(line) for _, line in lines), documents)


def _end_in_newline(line: str) -> str:
    return line.rstrip("\r\n") + "\n" if line.endswith(("\r", "\n")) else line


def _plain_documents(file: File, lines: Iterable[str], documents: str) -> Iterator[str]:
    """Yield what stands between end tokens, for paragraphs between blank lines too; blank texts are left out."""
    parts = io.StringIO()  # a list of short lines takes ten times the memory

    def finish() -> Iterator[str]:
        text = parts.getvalue()
        parts.seek(0)
        parts.truncate()
        if text.strip():
            yield text.strip("\n") if documents == "paragraph" else text

    for line in lines:
        if documents == "paragraph" and not line.strip():
            yield from finish()
            continue  # a blank line may hold spaces
        first, *others = line.split(END_TOKEN)
        parts.write(first)
        for part in others:
            yield from finish()
            parts.write(part.removeprefix("\n"))
        file.check_text_size(parts.tell())
    yield from finish()
