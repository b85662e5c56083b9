"""CRC-32 checksums: they tell a file that was damaged since it was written from one that was not."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import IO

_CHUNK_SIZE = 1 << 20  # bytes of a file that are held at once


def file_crc32(path: str | os.PathLike[str], *, sync: bool = False) -> tuple[int, int]:
    """Return (size in bytes, CRC-32) of a file; with `sync` it is on the disk afterwards."""
    # Not CRC-32C, which takes an eighth of the time (2.6 GB/s here): Orbax's files end with their own CRC-32C, and over
    # such a file it is the same number whatever the file holds.
    size = crc = 0
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        for chunk in iter_chunks(file):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


def iter_chunks(file: IO[bytes], size: int | None = None) -> Iterator[bytes]:
    """Yield the rest of an open file, or its next `size` bytes at most, in chunks of a MiB."""
    left = size
    while chunk := file.read(_CHUNK_SIZE if left is None else min(_CHUNK_SIZE, left)):
        yield chunk
        left = None if left is None else left - len(chunk)
