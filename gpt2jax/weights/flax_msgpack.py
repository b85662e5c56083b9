"""Weights that transformers' Flax models saved: flax_model.msgpack, read without loading the file into memory.

Source: `flax.serialization.msgpack_serialize`: a MessagePack map of maps, each array an extension of type 1 that holds
(shape, name of the dtype, bytes). `FlaxConv1D` of transformers 4 keeps its kernels [out, in], the reverse of PyTorch's.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from gpt2jax.weights import hf
from gpt2jax.weights.mapping import LazyTensor, ParamRule, WeightSource, numpy_dtype

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
# first byte -> (format of the length or number behind it)
_LENGTHS = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I", 0xC7: ">B", 0xC8: ">H", 0xC9: ">I", 0xD9: ">B", 0xDA: ">H", 0xDB: ">I",
            0xDC: ">H", 0xDD: ">I", 0xDE: ">H", 0xDF: ">I"}  # fmt: skip
_NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i",
            0xD3: ">q"}  # fmt: skip


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
            tree = reader.read()
            if reader.position != len(content):
                raise ValueError("there is more behind its end")
        tensors: dict[str, LazyTensor] = {}
        _flatten(tree, "", tensors)
    except (ValueError, IndexError, TypeError, struct.error) as error:
        raise ValueError(f"{path} is cut short, damaged, or not Flax weights: {error}") from None
    return tensors


def _flatten(node: Any, prefix: str, tensors: dict[str, LazyTensor]) -> None:
    if isinstance(node, LazyTensor):
        tensors[prefix[:-1]] = node
    elif isinstance(node, dict):
        for name, value in node.items():
            _flatten(value, f"{prefix}{name}.", tensors)
    else:
        raise ValueError(
            f"{prefix[:-1] or 'its content'!s:.100} must be an array, got a {type(node).__name__}"
        )


class _Reader:
    """Reads MessagePack; arrays become tensors that are read later."""

    def __init__(self, path: Path, content: Any, position: int = 0):
        self.path, self.content, self.position = path, content, position

    def take(self, count: int) -> bytes:
        if self.position + count > len(self.content):
            raise ValueError("it ends inside a value")
        self.position += count
        return self.content[self.position - count : self.position]

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def read(self, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("its maps are nested too deeply")
        kind = self.take(1)[0]
        if kind < 0x80 or kind >= 0xE0:
            return kind if kind < 0x80 else kind - 256
        if kind in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[kind]
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind < 0xC0:  # short maps, lists and texts
            length = kind & (0x1F if kind >= 0xA0 else 0x0F)
        elif kind in _LENGTHS:
            length = self.number(_LENGTHS[kind])
        else:
            length = 1 << (kind - 0xD4)  # extensions of 1, 2, 4, 8 and 16 bytes
        if 0xC7 <= kind <= 0xC9 or 0xD4 <= kind <= 0xD8:
            return self.extension(length)
        if 0xA0 <= kind < 0xC0 or 0xD9 <= kind <= 0xDB:
            return self.take(length).decode()
        if 0xC4 <= kind <= 0xC6:
            return self.take(length)
        if length > len(self.content) - self.position:
            raise ValueError("it has more entries than bytes")
        if kind < 0x90 or kind >= 0xDE:
            return {str(self.read(depth + 1)): self.read(depth + 1) for _ in range(length)}
        return [self.read(depth + 1) for _ in range(length)]

    def extension(self, length: int) -> LazyTensor:
        """Return the array of an extension of type 1: its shape, the name of its dtype, and its bytes."""
        if self.number(">b") != 1 or self.position + length > len(self.content):
            raise ValueError("it ends inside an array, or holds a value that is not one")
        end = self.position + length
        if self.take(1)[0] != 0x93:
            raise ValueError("an array without shape, dtype and bytes")
        shape, dtype = self.read(1), self.read(1)
        dtype = dtype.decode() if isinstance(dtype, bytes) else dtype
        if dtype not in _DTYPES or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"an array of dtype {dtype!r:.50} and shape {shape!r:.50}")
        count = math.prod(shape)
        size = self.number(_LENGTHS[self.take(1)[0]])
        if size != count * numpy_dtype(dtype).itemsize or self.position + size != end:
            raise ValueError(f"an array of shape {shape!r:.50} with {size} bytes")
        start, self.position = self.position, end
        path, place = self.path, tuple(shape)

        def read() -> np.ndarray:
            return np.fromfile(path, numpy_dtype(dtype), count, offset=start).reshape(place)

        return LazyTensor(place, dtype, read, str(path), start)
