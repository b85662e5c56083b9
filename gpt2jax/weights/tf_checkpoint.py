"""TensorFlow checkpoints ("tensor bundles"), read without TensorFlow; all their checksums are verified.

PREFIX.index is a LevelDB table of name -> entry, PREFIX.data-0000K-of-0000N are the raw little-endian values.

Source: tensorflow/core/util/tensor_bundle and core/lib/io/format.cc of TensorFlow; core/protobuf/tensor_bundle.proto.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpt2jax.weights.mapping import MAX_NAME_LENGTH, LazyTensor, numpy_dtype

MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
FOOTER = 48  # bytes
MAX_INDEX = 64_000_000  # bytes; that of GPT-2 has some thousand
MAX_AXES = 32  # of a tensor
# numbers of tensorflow/core/framework/types.proto; values of other kinds, such as texts, are not weights
DTYPES = {
    1: "float32", 2: "float64", 3: "int32", 4: "uint8", 5: "int16", 6: "int8", 9: "int64", 10: "bool",
    14: "bfloat16", 17: "uint16", 19: "float16", 22: "uint32", 23: "uint64",
}  # fmt: skip


def read_checkpoint(prefix: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """Return the tensors of a checkpoint by name; values are read, and their checksum verified, when asked for.

    Tensors of text, such as the object graph that Keras saves, are left out.

    Args:
        prefix: path without `.index` and `.data-...`.

    Raises:
        ValueError: the index or a data file is missing, damaged, or of a kind that cannot be read; the message names
            the file, and the tensor if the problem is one tensor.
    """
    index = Path(f"{prefix}.index")
    try:
        size = index.stat().st_size
    except FileNotFoundError:
        raise ValueError(
            f"there is no checkpoint {prefix}; expected {index.name} and its data beside it"
        ) from None
    if size > MAX_INDEX:
        raise ValueError(f"{index} must have at most {MAX_INDEX} bytes, got {size}")
    try:
        entries = dict(_read_table(index.read_bytes()))
        return _tensors(Path(prefix), entries)
    except (IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"{index} is cut short or damaged: {error}") from None
    except ValueError as error:
        raise ValueError(str(error) if str(prefix) in str(error) else f"{index}: {error}") from None


def _tensors(prefix: Path, entries: dict[bytes, bytes]) -> dict[str, LazyTensor]:
    if b"" not in entries:
        raise ValueError("it has no header")
    header = _fields(entries.pop(b""))
    num_shards, endianness = _number(header, 1), _number(header, 2)
    if endianness:
        raise ValueError("it is big-endian, which cannot be read")
    tensors = {
        name.decode("utf-8"): _tensor(prefix, num_shards, name.decode("utf-8"), entry)
        for name, entry in entries.items()
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _tensor(prefix: Path, num_shards: int, name: str, raw_entry: bytes) -> LazyTensor | None:
    """Return the tensor that an entry describes; None if it is not of numbers."""
    entry = _fields(raw_entry)
    shard, offset, size = (_number(entry, field) for field in (3, 4, 5))
    data = Path(f"{prefix}.data-{shard:05}-of-{num_shards:05}")
    if not data.is_file():
        raise ValueError(f"{data} is missing; it holds {name}")
    if offset + size > data.stat().st_size:
        raise ValueError(f"{data} is cut short: {name} ends at {offset + size}")
    dtype = DTYPES.get(_number(entry, 1))
    if dtype is None:
        return None
    if 7 in entry:
        raise ValueError(f"tensor {name} is saved in slices, which cannot be read")
    dims = _fields(_bytes_of(entry, 2)).get(2, [])
    shape = tuple(_number(_fields(_bytes(dim)), 1) for dim in dims[:MAX_AXES])
    if size != math.prod(shape) * numpy_dtype(dtype).itemsize:
        raise ValueError(f"tensor {name} {list(shape)} {dtype} cannot have {size} bytes")
    checksum = int.from_bytes(_bytes_of(entry, 6), "little")

    def read() -> np.ndarray:
        values = np.fromfile(data, numpy_dtype(dtype), math.prod(shape), offset=offset)
        if masked_crc32c(values) != checksum:
            raise ValueError(f"{data} is damaged: the checksum of tensor {name} does not match")
        return values.reshape(shape)

    return LazyTensor(shape, dtype, read, str(data))


def masked_crc32c(data: bytes | np.ndarray) -> int:
    """Return TensorFlow's checksum: the CRC-32C rotated and offset, as in tensorflow/core/lib/hash/crc32c.h."""
    import google_crc32c  # which nothing but such a checkpoint needs

    if isinstance(data, np.ndarray):
        data = data.reshape(-1).view(np.uint8)
        data.flags.writeable = False  # google_crc32c takes read-only buffers only; this is a view
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def checkpoint_prefix(path: Path) -> Path | None:
    """Return the prefix of the checkpoint that a path stands for, or None.

    The path is a prefix, an index file, or a folder. In a folder the text file `checkpoint` names the newest
    checkpoint; without that file, the folder must have exactly one index.
    """
    if path.name.endswith(".index") and path.is_file():
        return path.with_name(path.name.removesuffix(".index"))
    if Path(f"{path}.index").is_file():
        return path
    if not path.is_dir():
        return None
    note = path / "checkpoint"
    if note.is_file() and note.stat().st_size < MAX_INDEX:
        found = re.search(
            r'^model_checkpoint_path: "([^"\n]+)"', note.read_text("utf-8", "replace"), re.MULTILINE
        )
        # the name only: the folder may have moved since
        if found and (path / f"{Path(found[1]).name}.index").is_file():
            return path / Path(found[1]).name
    names = checkpoint_names(path)
    return path / names[0] if len(names) == 1 else None


def checkpoint_names(folder: Path) -> list[str]:
    """Return the names of the checkpoints in a folder."""
    return sorted(index.name.removesuffix(".index") for index in folder.glob("*.index"))


# ---- LevelDB tables ----


def _read_table(raw: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (key, value) of a table."""
    if len(raw) < FOOTER or not raw.endswith(MAGIC):
        raise ValueError(
            "it is cut short, or not an index of a checkpoint: its last 8 bytes are not the format's mark"
        )
    handles, position = [], len(raw) - FOOTER
    for _ in range(4):  # offset and size of the block of metadata and of the block of blocks
        number, position = _varint(raw, position)
        handles.append(number)
    seen, total = set[int](), 0
    for _, handle in _block(raw, *handles[2:]):
        offset, end = _varint(handle, 0)
        size, _ = _varint(handle, end)
        total += size
        if offset in seen or total > len(raw):
            raise ValueError("two blocks at one place")
        seen.add(offset)
        yield from _block(raw, offset, size)


def _block(raw: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield (key, value) of a block; a key is stored as its difference from the key before."""
    block, trailer = raw[offset : offset + size], raw[offset + size : offset + size + 5]
    if len(block) != size or len(trailer) != 5 or size < 4:
        raise ValueError("a block reaches over its end")
    if masked_crc32c(block + trailer[:1]) != int.from_bytes(trailer[1:], "little"):
        raise ValueError("it is damaged: the checksum of a block does not match")
    if trailer[0]:
        raise ValueError("it is compressed, which cannot be read")
    end = size - 4 - 4 * int.from_bytes(block[-4:], "little")  # the restart points behind the entries
    position, key = 0, b""
    while position < end:
        shared, position = _varint(block, position)
        added, position = _varint(block, position)
        length, position = _varint(block, position)
        if shared > len(key) or position + added + length > end:
            raise ValueError("an entry reaches over the end of its block")
        if shared + added > MAX_NAME_LENGTH:  # thousands of names may share a long beginning
            raise ValueError(f"a name has more than {MAX_NAME_LENGTH} bytes")
        key = key[:shared] + block[position : position + added]
        position += added + length
        yield key, block[position - length : position]


# ---- protocol buffers ----


def _fields(message: bytes) -> dict[int, list[int | bytes]]:
    """Return field number -> its values: numbers for varints, bytes for everything else."""
    fields: dict[int, list[int | bytes]] = {}
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == 0:
            value, position = _varint(message, position)
        else:
            if kind == 2:
                length, position = _varint(message, position)
            elif kind in (1, 5):
                length = 8 if kind == 1 else 4
            else:
                raise ValueError(f"a field of the unknown kind {kind}")
            value = message[position : position + length]
            position += length
            if position > len(message):
                raise ValueError("a field reaches over its end")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _number(fields: dict[int, list[int | bytes]], field: int) -> int:
    value = fields.get(field, [0])[-1]
    if not isinstance(value, int):
        raise ValueError(f"field {field} is not a number")
    return value


def _bytes_of(fields: dict[int, list[int | bytes]], field: int) -> bytes:
    return _bytes(fields.get(field, [b""])[-1])


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field is a number where bytes are expected")
    return value


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    """Read a number in groups of 7 bits, low ones first; return it and the position behind it."""
    number = 0
    for shift in range(0, 70, 7):
        byte = raw[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise ValueError("a number has too many digits")
