"""Safetensors files, read and written by the `safetensors` library.

The library checks the header. The values are read from their place in the file, not by the library's `get_tensor`:
that makes a copy before the cast, and the pages of its mapped file count as memory of the process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gpt2jax.utils.validation import must_be
from gpt2jax.weights.mapping import LazyTensor, is_finite, numpy_dtype

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """Return the tensors of a file in the order of their data; values are read when asked for.

    Raises:
        ValueError: the file is not a safetensors file, is damaged, or has a dtype that NumPy lacks; the message names
            the file.
    """
    path = Path(path)
    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            entries = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or damaged: {error!s:.300}") from None
    with open(path, "rb") as file:
        position = 8 + int.from_bytes(file.read(8), "little")  # the data begins behind the header
    tensors: dict[str, LazyTensor] = {}
    for name, (shape, code) in entries.items():
        if code not in DTYPES:
            raise ValueError(
                must_be(f"{path}: the dtype of tensor {name}", f"one of {', '.join(DTYPES)}", code)
            )
        tensors[name] = _lazy_tensor(path, name, shape, DTYPES[code], position)
        position += math.prod(shape) * numpy_dtype(DTYPES[code]).itemsize  # the format allows no gaps
    return tensors


def _lazy_tensor(path: Path, name: str, shape: tuple[int, ...], dtype: str, offset: int) -> LazyTensor:
    def read() -> np.ndarray:
        count = math.prod(shape)
        values = np.fromfile(path, numpy_dtype(dtype), count, offset=offset)
        if values.size != count:
            raise ValueError(f"{path} is cut short: tensor {name} is not whole")
        return values.reshape(shape)

    return LazyTensor(shape, dtype, read, str(path), offset)


def write_safetensors(
    path: str | os.PathLike[str],
    arrays: Iterable[tuple[str, np.ndarray]],
    dtype: str,
    metadata: Mapping[str, str],
) -> None:
    """Write a file. Callers write into an `atomic_folder`, which flushes it to the disk.

    Host memory holds all of `arrays`, and a copy of those that `dtype` rounds.

    Args:
        path: the file.
        arrays: (name, values).
        dtype: of the file, as NumPy names it; values are rounded to it.
        metadata: strings for the header.

    Raises:
        ValueError: a value is not a finite number in `dtype`; the message names its tensor.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, values in arrays:
        with np.errstate(over="ignore"):
            # the library writes the bytes as they lie, so that they must lie in order
            tensors[name] = np.asarray(values, numpy_dtype(dtype), order="C")
        if not is_finite(tensors[name]):
            raise ValueError(f"tensor {name} holds values that are not finite in {dtype}")
    save_file(tensors, path, dict(metadata))
