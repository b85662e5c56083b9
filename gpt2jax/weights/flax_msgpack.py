"""Weights that transformers' Flax models saved: flax_model.msgpack, read without loading the file into memory.

Source: `flax.serialization.msgpack_serialize`: a MessagePack map of maps, each array an extension of type 1 that holds
(shape, name of the dtype, bytes). `FlaxConv1D` of transformers 4 keeps its kernels [out, in], the reverse of PyTorch's.
The library `msgpack` copies the whole file into memory; here only the places of the arrays are read.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from gpt2jax.weights import hf
from gpt2jax.weights.mapping import MAX_NAME_LENGTH, LazyTensor, ParamRule, WeightSource, numpy_dtype

FILE = "flax_model.msgpack"
RULES = tuple(
    ParamRule(
        f"h.{{layer}}.{rule.path[2:]}" if rule.path.startswith("h.") else rule.path,
        rule.path,
        "transposed" if rule.path.endswith("kernel") else "same",
    )
    for rule in hf.RULES
)
MAX_DEPTH = 20
_DTYPES = ("float32", "float16", "bfloat16", "float64", "int32", "int64", "uint8", "bool")
# first byte -> format of the length or number that follows; other values do not occur in files of weights
_MAPS = {0xDE: ">H", 0xDF: ">I"}
_TEXTS = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
_BYTES = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}
_EXTENSIONS = {0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}
_NUMBERS = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}


def is_flax(path: Path) -> bool:
    """Return True if a path looks like Flax weights of transformers, or a folder with them."""
    return path.suffix == ".msgpack" or (path / FILE).is_file()


def open_flax(path: Path) -> WeightSource:
    """Return the weights of a flax_model.msgpack, or of the folder with one, no value read.

    Raises:
        ValueError: the file is damaged, or config.json is missing or does not fit.
    """
    file = path / FILE if path.is_dir() else path
    config = hf.read_config(file.parent)
    return WeightSource(config, RULES, hf.strip_wrappers(read_msgpack(file), str(file)), str(file))


def read_msgpack(path: Path) -> dict[str, LazyTensor]:
    """Return the arrays of a file by their names, joined by dots.

    Raises:
        ValueError: the file is cut short or damaged, or holds anything but arrays.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            reader = _Reader(path, content)
            reader.read_map("")
            if reader.position != len(content):
                raise ValueError("it goes on after its end")
    except (ValueError, IndexError, struct.error) as error:
        raise ValueError(f"{path} is cut short, damaged, or not Flax weights: {error}") from None
    return reader.tensors


class _Reader:
    """Reads a MessagePack map of maps; arrays become tensors that are read later."""

    def __init__(self, path: Path, content: Any):
        self.path, self.content, self.position = path, content, 0
        self.tensors: dict[str, LazyTensor] = {}

    def read_map(self, prefix: str, depth: int = 0) -> None:
        """Note the tensors of the map at the position, and of the maps in it."""
        if depth > MAX_DEPTH:
            raise ValueError("its maps are nested too deeply")
        length = self._length(_MAPS, 0x80, 0x8F)
        if length is None or length > len(self.content) - self.position:
            raise ValueError(f"{prefix.removesuffix('.') or 'its content'!s:.100} must be a map or an array")
        for _ in range(length):
            name = prefix + self._text()
            if len(name) > MAX_NAME_LENGTH:  # thousands of names may share a long beginning
                raise ValueError(f"a name has more than {MAX_NAME_LENGTH} characters")
            if (size := self._length(_EXTENSIONS)) is None:
                self.read_map(f"{name}.", depth + 1)
            else:
                self.tensors[name] = self._tensor(size)

    def _tensor(self, length: int) -> LazyTensor:
        end = self.position + 1 + length
        mark, dims = self._take(2), self._length({}, 0x90, 0x9F)
        if mark != b"\x01\x93" or dims is None:
            raise ValueError("an array without shape, dtype and bytes")
        shape, dtype = tuple(self._number() for _ in range(dims)), self._text()
        size = self._length(_BYTES)
        if size is None or dtype not in _DTYPES or size != math.prod(shape) * numpy_dtype(dtype).itemsize:
            raise ValueError(f"an array of dtype {dtype!r:.50} and shape {shape!r:.50} with {size} bytes")
        path, start, self.position = self.path, self.position, end
        if start + size != end or end > len(self.content):
            raise ValueError("it ends inside an array")

        def read() -> np.ndarray:
            return np.fromfile(path, numpy_dtype(dtype), math.prod(shape), offset=start).reshape(shape)

        return LazyTensor(shape, dtype, read, str(path), start)

    def _take(self, count: int) -> bytes:
        if self.position + count > len(self.content):
            raise ValueError("it ends inside a value")
        self.position += count
        return self.content[self.position - count : self.position]

    def _length(self, formats: dict[int, str], first: int = 1, last: int = 0) -> int | None:
        """Return the length of a value of one kind, or None, and stay, if the next value is of another kind.

        Args:
            formats: by the first byte, how a length that follows is written.
            first, last: the first bytes that hold the length themselves.
        """
        kind = self.content[self.position]
        if first <= kind <= last:
            self.position += 1
            return kind - first
        if kind not in formats:
            return None
        self.position += 1
        return self._unpack(formats[kind])

    def _unpack(self, code: str) -> int:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _text(self) -> str:
        length = self._length(_TEXTS, 0xA0, 0xBF)
        if length is None:
            raise ValueError("a name that is not a text")
        return self._take(length).decode()

    def _number(self) -> int:
        number = self._length(_NUMBERS, 0, 0x7F)
        if number is None:
            raise ValueError("a shape of something else than whole numbers")
        return number
