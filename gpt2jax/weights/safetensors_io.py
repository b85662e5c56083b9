"""Safetensors files: the header checked in full, then one tensor read at a time; written as a stream.

The reader holds no more than one tensor and knows bfloat16 without torch; the writer takes one tensor after
the other, where the library wants them all at once.

Source: the format's description in the safetensors repository: 8 bytes little-endian header length; a header
of JSON, {name: {dtype, shape, data_offsets: [begin, end]}}; the raw little-endian bytes without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from gpt2jax.utils.atomic_io import atomic_write
from gpt2jax.weights.mapping import LazyTensor, numpy_dtype

MAX_HEADER = 100_000_000  # bytes; the library's own limit
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
CODES = {name: code for code, name in DTYPES.items()}


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """The tensors of a file in the order of their data; values are read when asked for.

    Raises:
        ValueError: the file is not in the format or damaged; the message names file and tensor.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise ValueError(
                f"{path} is not a whole safetensors file: its {size} bytes do not hold its header"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a safetensors file: its header is not JSON: {error}") from None
    header.pop("__metadata__", None)
    data_start = 8 + length
    tensors: dict[str, LazyTensor] = {}
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: _begin(path, item)):
        tensors[name], position = _check(path, name, entry, data_start, position)
    if data_start + position != size:
        raise ValueError(
            f"{path} is cut short or damaged: {size} bytes, but its header describes {data_start + position}"
        )
    return tensors


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _begin(path: Path, item: tuple[str, object]) -> int:
    name, entry = item
    try:
        begin, end = entry["data_offsets"]  # pyright: ignore[reportIndexIssue]
        if type(begin) is int and type(end) is int:
            return begin
    except (TypeError, KeyError, ValueError):
        pass
    raise ValueError(f"{path}: the header's entry of tensor {name} is damaged: {entry!r:.100}")


def _check(path: Path, name: str, entry: dict, data_start: int, position: int) -> tuple[LazyTensor, int]:
    """One header entry as a tensor and the position behind it, when it begins where the last one ended."""
    begin, end = entry["data_offsets"]
    shape, code = entry.get("shape"), entry.get("dtype")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{path}: tensor {name} has the impossible shape {shape!r:.100}")
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{path}: tensor {name} has the dtype {code!r:.100}; known: {', '.join(DTYPES)}")
    dtype = numpy_dtype(DTYPES[code])
    count = math.prod(shape)
    if begin != position or end - begin != count * dtype.itemsize:
        raise ValueError(
            f"{path}: tensor {name} {shape} {code} cannot lie at bytes {begin} to {end}, after {position}"
        )

    def read() -> np.ndarray:
        values = np.fromfile(path, dtype, count, offset=data_start + begin)
        if values.size != count:
            raise ValueError(f"{path} is cut short: tensor {name} is not whole")
        return values.reshape(shape)

    return LazyTensor(tuple(shape), DTYPES[code], read, str(path), data_start + begin), end


def write_safetensors(
    path: str | os.PathLike[str],
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Iterable[tuple[str, np.ndarray]],
    dtype: str,
    metadata: Mapping[str, str],
) -> None:
    """Writes a file, holding one tensor at a time; whole or not at all.

    Args:
        path: the file.
        shapes: of all tensors, in the order in which `arrays` delivers them.
        arrays: (name, values).
        dtype: of the file, as NumPy names it; values are rounded to it.
        metadata: strings for the header.

    Raises:
        ValueError: a value is not a finite number in `dtype`; the message names its tensor.
    """
    target = numpy_dtype(dtype)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * target.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)  # the data begins at a multiple of 8 bytes
    with atomic_write(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for expected, (name, values) in zip(shapes, arrays, strict=True):
            if name != expected or values.shape != shapes[name]:
                raise ValueError(f"tensor {name} {values.shape} does not follow the order of the header")
            with np.errstate(over="ignore"):
                narrow = np.ascontiguousarray(values, target)
            if not np.isfinite(narrow).all():
                raise ValueError(f"tensor {name} holds values that are not finite in {dtype}")
            file.write(narrow.reshape(-1).view(np.uint8).data)
