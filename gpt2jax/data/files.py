"""Files of texts: found and opened, on this machine, in zip archives and on the hub; `readers` reads them.

fsspec opens them, as it does for `datasets`; tables (Parquet, Arrow) are read by pyarrow. Rows of JSON and CSV go
through Python's own parsers, because those of `datasets` and pyarrow guess types and change texts: "2020-01-01"
becomes a time, "NA" and "null" become nothing, "007" a number, an object of columns one single row, and a CSV row
with a cell too many loses its first cell, all without an error (datasets 5.2). They name no line either.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import dataclasses
import functools
import glob
import gzip
import io
import lzma
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import PurePath, PurePosixPath
from typing import IO, Any

from gpt2jax.data.encodings import escaped_encoding, likely_encoding, unmarked_utf16, wide_encoding
from gpt2jax.utils.limits import check_in_memory, check_stream, most_in_memory
from gpt2jax.utils.notices import enumerate_names, notice
from gpt2jax.utils.stand_ins import describe_stand_in
from gpt2jax.utils.validation import must_be

PLAIN = (
    ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".htm", ".py", ".tokens", ".raw",
)  # fmt: skip
JSON = (".jsonl", ".ndjson", ".json")
TABLES = (".parquet", ".arrow", ".feather")
# extensions; a folder's files with others are passed over
FORMATS = (".txt", *JSON, ".csv", ".tsv", *TABLES, *PLAIN[1:])
# extensions of packed files. What a file is packed with is told by its first bytes alone.
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_BUFFER = 1 << 17
# a packed file that unpacks to so many bytes and so many times its size gives a notice
_MUCH, _MUCH_RATIO = 1 << 24, 50

_KNOWN = f"known are {', '.join(FORMATS)}, each also with {', '.join(COMPRESSIONS)}, and .zip of such files"
_HIDDEN = re.compile(r"(^|/)(\.|__MACOSX/)")
# files that describe a data set
_NOT_DATA = re.compile(
    r"(^|.*/)((README|LICEN[CS]E|CHANGELOG|CITATION)[^/]*"
    r"|(metadata|dataset_infos?|datapackage|croissant|config|package|state)\.json|requirements[^/]*\.txt)"
)
_ZIP_START = b"PK\x03\x04"
# bytes that texts in no encoding have, except UTF-16 and UTF-32, which are told apart before
_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")


def _open_zst(stream: IO[bytes]) -> IO[bytes]:
    """Unpack by pyarrow: fsspec's reader of .zst needs a package that nothing here requires."""
    import pyarrow

    return pyarrow.input_stream(stream, compression="zstd")  # pyright: ignore[reportReturnType]


# "BZh" alone may begin a text
_BZIP2 = tuple(b"BZh%d1AY&SY" % level for level in range(1, 10))
_UNPACKERS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    **dict.fromkeys(_BZIP2, bz2.open),
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": _open_zst,
}


_TAR = "a tar archive: unpack it, and give the folder"
# files that people name .txt, by how they begin; some of them are UTF-8
_NO_TEXTS = (
    (rb"%PDF-\d", "a PDF document: convert it to plain text first"),
    (rb"\{\\rtf\d", "a document in Rich Text Format: save it as plain text first"),
    (rb".{257}ustar[\0 ]", _TAR),
    (rb"\x04\x22\x4d\x18", "compressed by lz4: unpack it, or pack it with gzip or zstd"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it, and give the folder"),
    (rb"Rar!\x1a\x07", "a RAR archive: unpack it, and give the folder"),
)


@dataclasses.dataclass(frozen=True)
class File:
    """A file to read.

    Attributes:
        name: what messages call it.
        path: its place inside the folder or archive that it was found in, with "/".
        system: the fsspec file system that opens it.
        place: its name there.
        encoding: of its text, None for UTF-8.
    """

    name: str
    path: str
    system: Any
    place: str
    encoding: str | None = None

    @property
    def suffixes(self) -> tuple[str, str]:
        """The extension of the format and that of the compression, in lower case; "" if it has none."""
        *_, last = ["", *(suffix.lower() for suffix in PurePosixPath(self.path).suffixes)]
        if last not in COMPRESSIONS:
            return last, ""
        return PurePosixPath(self.path).with_suffix("").suffix.lower(), last

    @functools.cached_property
    def packed_size(self) -> int | None:
        """Bytes of the file as it lies there, None if that is not known."""
        info = self.system.info(self.place)
        return info.get("compress_size") or info.get("size")

    @property
    def most_characters(self) -> int:
        """Of one text, or of whatever else is in memory as a whole."""
        return most_in_memory(self.packed_size or 0) // 4  # the bytes, the text, and a copy of both

    def check_text_size(self, size: int) -> None:
        """Raise ValueError if the file is too small for a text of so many characters."""
        if size > self.most_characters:
            check_in_memory(self.name, 4 * size, self.packed_size or 0)

    @contextlib.contextmanager
    def open(self) -> Iterator[io.BufferedReader[Any]]:
        """Open the file for reading bytes, unpacked."""
        # texts are read several times; opening a pipe waits for ever, and a device has no end
        if "file" in self.system.protocol and os.path.exists(self.place) and not os.path.isfile(self.place):
            raise ValueError(f"{self.name} must be a file, got a pipe or a device")
        packed_size = self.packed_size
        with self.system.open(self.place, "rb") as raw:
            # which members of archives have
            is_plain = "compress_size" not in self.system.info(self.place)
            stream = io.BufferedReader(_Bytes(raw, self.name, packed_size, is_plain=is_plain), _BUFFER)
            start = stream.peek(10)
            if unpack := next((open for mark, open in _UNPACKERS.items() if start.startswith(mark)), None):
                stream = io.BufferedReader(_Bytes(unpack(stream), self.name, packed_size), _BUFFER)
            begin = stream.peek(512)[:512]
            reason = describe_stand_in(begin)
            if reason and (self.suffixes[0] not in PLAIN or "LFS" in reason):
                raise ValueError(f"{self.name} {reason}")
            if kind := next((kind for mark, kind in _NO_TEXTS if re.match(mark, begin, re.DOTALL)), None):
                raise ValueError(f"{self.name} is {kind}")
            yield stream

    def is_packed(self) -> bool:
        """Return whether the file is compressed by its first bytes."""
        with self.system.open(self.place, "rb") as raw:
            return raw.read(10).startswith(tuple(_UNPACKERS))

    @contextlib.contextmanager
    def open_seekable(self) -> Iterator[IO[bytes]]:
        """Open the file for reading at any place, a packed one through a copy on disk."""
        with self.open() as stream, contextlib.ExitStack() as stack:
            if isinstance(stream.raw, _Bytes) and stream.raw.is_plain:
                yield stack.enter_context(self.system.open(self.place, "rb"))
                return
            plain = stack.enter_context(tempfile.TemporaryFile())
            while chunk := stream.read(1 << 20):
                plain.write(chunk)
            plain.seek(0)
            yield plain

    def lines(self) -> Iterator[tuple[int, str]]:
        r"""Yield (number, line with its end) of a text; lines end in \n, \r\n or, as on old Macs, \r."""
        with self.open() as stream:
            if self.encoding is not None:
                yield from self._decoded_lines(stream, self.encoding)
                return
            start = stream.peek(4096)[:4096]
            if found := wide_encoding(start):
                sure = "by its first bytes" if found in ("utf-16", "utf-32") else "by its zero bytes"
                raise ValueError(f"{self.name} is {found.upper()} {sure}; {_encoding_hint(found)}")
            if start.count(0) > len(start) // 20:
                raise ValueError(f"{self.name} holds binary data, not text: many of its first bytes are zero")
            number = offset = 0
            while raw := stream.readline(self.most_characters + 1):
                self.check_text_size(len(raw))
                try:
                    text = raw.decode("utf-8" if offset else "utf-8-sig")
                except UnicodeDecodeError as error:
                    start = error.start + (3 if not offset and raw[:3] == codecs.BOM_UTF8 else 0)
                    wrong = f"byte 0x{raw[start]:02x} at offset {offset + start} (line {number + 1})"
                    sample = raw + stream.read(1 << 16)
                    if not offset and (found := unmarked_utf16(sample)):
                        raise ValueError(
                            f"{self.name} is probably {found.upper()}: {_encoding_hint(found)}"
                        ) from None
                    if _CONTROLS.search(sample):
                        raise ValueError(f"{self.name} holds binary data, not text: {wrong}") from None
                    found = likely_encoding(sample)
                    hint = f"it is probably {found}: {_encoding_hint(found)}"
                    raise ValueError(f"{self.name} is not UTF-8: {wrong}; {hint}") from None
                if b"\x1b" in raw and (found := escaped_encoding(raw)):
                    reason = f"an escape sequence in line {number + 1} is of this encoding"
                    raise ValueError(f"{self.name} is probably {found}: {reason}; {_encoding_hint(found)}")
                offset += len(raw)
                for line in _split_at_returns(text):
                    number += 1
                    yield number, line

    def _decoded_lines(self, stream: io.BufferedReader, encoding: str) -> Iterator[tuple[int, str]]:
        if _is_utf8(stream.peek(4096)[:4096]) and codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig"):
            notice(
                f"{self.name} is read as {encoding}, though its first bytes are UTF-8 beyond ASCII: is that meant?"
            )
        text = io.TextIOWrapper(stream, encoding, newline="")
        number = 0
        try:
            while line := text.readline(self.most_characters + 1):
                self.check_text_size(len(line))
                number += 1
                yield number, line.removeprefix("\ufeff") if number == 1 else line
        except UnicodeError as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.name} is not {encoding} after line {number}; {reason}") from None
        finally:
            text.detach()


class _Bytes(io.RawIOBase):
    """A stream whose bytes are counted: a small file must not fill the memory when it is unpacked."""

    def __init__(self, stream: Any, name: str, packed_size: int | None, *, is_plain: bool = False):
        self.stream, self.name, self.packed_size, self.is_plain = stream, name, packed_size, is_plain
        self.count, self.is_said = 0, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self.stream.read(len(buffer))
        buffer[: len(chunk)] = chunk
        self.count += len(chunk)
        check_stream(self.name, self.count, self.packed_size)
        if not self.is_said and self.count > max(_MUCH, _MUCH_RATIO * (self.packed_size or self.count)):
            self.is_said = True
            notice(f"{self.name} unpacks to more than {_MUCH_RATIO} times its size; reading it takes a while")
        return len(chunk)


def check_encoding(encoding: str | None) -> None:
    """Raise ValueError unless Python knows the encoding."""
    try:
        if encoding is not None:
            "".encode(encoding)
    except (LookupError, TypeError, ValueError):
        legal = "the name of an encoding such as utf-8, cp1252 or utf-16"
        raise ValueError(must_be("encoding", legal, encoding)) from None


def _encoding_hint(name: str) -> str:
    return f"read it with encoding={name!r} (--encoding {name}), or convert it to UTF-8"


def _is_utf8(start: bytes) -> bool:
    """Return whether bytes, which may end inside a character, are UTF-8 and more than ASCII."""
    try:
        return not codecs.getincrementaldecoder("utf-8")().decode(start).isascii()
    except UnicodeDecodeError:
        return False


def _split_at_returns(text: str) -> list[str]:
    r"""Return the lines of a text that ends with its only \n."""
    if "\r" not in text.removesuffix("\r\n").removesuffix("\r"):
        return [text]
    return re.findall(r"[^\r]*(?:\r\n|\r|$)", text)[:-1]


def has_pattern(source: str) -> bool:
    """Return whether a source is a pattern of paths such as data/*.txt: it has a * ? or [ and is not a path."""
    return bool(re.search(r"[*?[]", source)) and not os.path.exists(source)


def list_files(source: str, encoding: str | None = None) -> list[File]:
    """Return the file at a path or `hf://` path, or those of known formats in a folder or zip archive, sorted.

    A local path may be a pattern with * ? [ ] and ** for folders.

    Raises:
        ValueError: the format is unknown, or nothing in the folder has a known one.
        FileNotFoundError: there is no such file or folder, or nothing fits the pattern.
    """
    if "://" not in source and has_pattern(source):
        found = sorted(glob.glob(os.path.expanduser(source), recursive=True))
        if not found:
            raise FileNotFoundError(f"there is no file that fits the pattern {source}")
        known = [path for path in found if os.path.isdir(path) or _is_known(path, ".zip")]
        if not known:
            raise ValueError(f"no file that fits {source} has a known format; {_KNOWN}")
        _say_passed_over(source, [path for path in found if path not in known])
        if len(known) > 1 and "**" in source:  # a folder's files fit by themselves
            known = [path for path in known if not os.path.isdir(path)]
        root = os.path.dirname(re.split(r"[*?[]", os.path.expanduser(source))[0])
        return [
            dataclasses.replace(file, path=_path_below(root, path, file))
            for path in known
            for file in list_files(path, encoding)
        ]
    system, root, is_archive = _file_system(source)

    def as_file(place: str) -> File:
        path = place.removeprefix(root).lstrip("/")
        name = f"{source.rstrip('/')}{':' if is_archive else '/'}{path}" if path else source
        return File(name, path or PurePosixPath(place).name, system, place, encoding)

    if system.info(root)["type"] != "directory":
        file = as_file(root)
        if file.suffixes[0] in (".tar", ".tgz"):
            raise ValueError(f"{source} is {_TAR}")
        if file.suffixes[0] not in FORMATS:
            raise ValueError(
                f"{source}: unknown format {file.suffixes[0] or 'without an extension'!r}; {_KNOWN}"
            )
        return [file]
    every = [file for file in map(as_file, system.find(root)) if not _HIDDEN.search(file.path)]
    files = [file for file in every if _is_known(file.path)]
    if not files:
        raise ValueError(f"{source} holds no file of a known format; {_KNOWN}")
    _say_passed_over(source, [file.path for file in every if file not in files])
    return sorted(files, key=lambda file: file.path.split("/"))


def _path_below(root: str, found: str, file: File) -> str:
    """Return the path of a file, found by a pattern, below the folder where the pattern begins: it tells the split."""
    below = PurePath(found).relative_to(root).as_posix()
    return f"{below}/{file.path}" if os.path.isdir(found) or zipfile.is_zipfile(found) else below


def _file_system(source: str) -> tuple[Any, str, bool]:
    """Return the fsspec file system of a source, the source's place in it, and whether it is a zip archive."""
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem
    from fsspec.implementations.zip import ZipFileSystem

    is_zip = source.lower().endswith(".zip")
    if "://" in source:
        return *url_to_fs(f"zip://::{source}" if is_zip else source), is_zip
    if os.path.isfile(source):
        with open(source, "rb") as file:
            # Kaggle's files are zip archives under the name of their content
            is_zip |= file.read(4) == _ZIP_START and _is_known(source)
        if is_zip:
            # a version that is not known, an entry without a name, no entry
            errors = (zipfile.BadZipFile, NotImplementedError, IndexError, FileNotFoundError)
            try:
                system = ZipFileSystem(source)
                system.info("")
            except errors as error:
                reason = str(error) or "its list of files is damaged or empty"
                raise ValueError(f"{source} is not a zip archive: {reason}") from None
            return system, "", True
    return LocalFileSystem(), os.path.abspath(source), False


def _is_known(path: str, *more: str) -> bool:
    """Return whether a file's name says that it holds texts in a known format, or has one of more extensions."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes]
    while suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in (*FORMATS, *more) and not _NOT_DATA.fullmatch(path)


def _say_passed_over(source: str, names: list[str]) -> None:
    if names:
        files = "1 file" if len(names) == 1 else f"{len(names)} files"
        notice(f"{source}: passed over {files} without texts by name: {enumerate_names(sorted(names))}")
