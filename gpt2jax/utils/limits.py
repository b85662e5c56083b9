"""How much memory a file may ask for: a small file must not fill the machine.

What a file unpacks to may be a small multiple of its size; the environment variable `GPT2JAX_MAX_UNPACKED_BYTES` allows
more. Streams whose parts leave the memory again, such as rows of texts, may be larger.
"""

from __future__ import annotations

import os

from gpt2jax.utils.validation import must_be

VARIABLE = "GPT2JAX_MAX_UNPACKED_BYTES"
RATIO, FREE_BYTES = 4, 400_000_000  # legal in memory: so many times the file, and so many bytes more
STREAM_RATIO, STREAM_FREE_BYTES = 1000, 1 << 28  # legal in a stream: the larger one of both
JSON_BYTES = 25_000_000  # of a file with one object: as Python's objects JSON takes up to 24 times its size


def check_in_memory(name: str, size: int, file_size: int) -> None:
    """Raise ValueError if a file is too small for so many bytes in memory."""
    _check(name, size, most_in_memory(file_size), file_size)


def most_in_memory(file_size: int) -> int:
    """Return how many bytes a file of that size may take in memory."""
    return max(RATIO * file_size + FREE_BYTES, _allowed())


def check_stream(name: str, size: int, packed_size: int | None) -> None:
    """Raise ValueError if a packed file is too small for so many bytes, of which few are in memory at a time."""
    if packed_size is not None:
        _check(name, size, max(STREAM_FREE_BYTES, STREAM_RATIO * packed_size), packed_size)


def check_json_size(name: str, size: int) -> None:
    """Raise ValueError for a file of JSON that is too large to be read as a whole."""
    most = max(JSON_BYTES, _allowed())
    if size > most:
        raise ValueError(
            f"{name} must have at most {most:,} bytes, got {size:,}; {VARIABLE}=BYTES allows more"
        )


def _check(name: str, size: int, most: int, file_size: int) -> None:
    if size > max(most, _allowed()):
        raise ValueError(
            f"{name} unpacks to {size:,} bytes or more, from {file_size:,}; {VARIABLE}=BYTES allows more"
        )


def _allowed() -> int:
    value = os.environ.get(VARIABLE, "0")
    if not (value.isascii() and value.isdecimal()):
        raise ValueError(must_be(VARIABLE, "a number of bytes", value))
    return int(value)
