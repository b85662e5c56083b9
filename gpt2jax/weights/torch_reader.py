"""Files of `torch.save`, zip and legacy, read without torch and without unpickling.

A pickle is a program that may run any code. Here only the instructions that build dicts, lists, tuples, strings,
numbers and tensors are carried out, by an interpreter of our own; anything else is refused by its name.

Source: torch/serialization.py of PyTorch. Zip: `NAME/data.pkl` and one stored entry `NAME/data/KEY` per storage.
Legacy (before 1.6): five pickles (magic number, protocol, platform, object, storage keys), then for each key the
number of elements in 8 bytes and the elements.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pickletools
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpt2jax.weights.mapping import LazyTensor, numpy_dtype

ZIP_START = b"PK\x03\x04"
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number, pickled
MAX_PICKLE = 32_000_000  # bytes; of the largest GPT-2 with its optimizer it has less than one
STORAGES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


@dataclasses.dataclass
class _Storage:
    """A run of numbers in the file; its place is known later than its name in legacy files."""

    key: str
    dtype: str
    numel: int
    start: int = -1
    checksum: int | None = None


def read_torch(path: str | os.PathLike[str]) -> Any:
    """What `torch.save` wrote: dicts, lists, tuples, strings, numbers, and a `LazyTensor`, not read, for each tensor.

    Raises:
        ValueError: the file is not of this kind, is damaged, or holds anything else; the message names both.
    """
    path = Path(path)
    with open(path, "rb") as file:
        start = file.read(len(LEGACY_START))
    if start.startswith(ZIP_START):
        return _read_zip(path)
    if start == LEGACY_START:
        return _read_legacy(path)
    raise ValueError(f"{path} is not a file of torch.save: it begins with neither of the two marks of one")


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """The tensors of a saved state dict by name.

    Raises:
        ValueError: the file is damaged, or something in it is not a tensor with a name.
    """
    content = read_torch(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, LazyTensor):
            raise ValueError(f"{path}: {name!s:.100} is a {type(value).__name__}, not a tensor with a name")
    return content


def _read_zip(path: Path) -> Any:
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = _entries(path, archive, size)
            (pickle_name,) = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
            root = pickle_name.removesuffix("data.pkl")
            program = archive.read(pickle_name)
            order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        NotImplementedError,
        OSError,
        EOFError,
        RuntimeError,
    ) as error:
        raise ValueError(f"{path} is cut short or damaged: {error}") from None
    except ValueError as error:
        message = str(error) if str(path) in str(error) else f"{path} is no file of torch.save: {error}"
        raise ValueError(message) from None
    if order != b"little":
        raise ValueError(f"{path} has the byte order {order[:20]!r}; only b'little' can be read")

    def locate(storage: _Storage) -> None:
        entry = entries.get(f"{root}data/{storage.key}")
        expected = storage.numel * numpy_dtype(storage.dtype).itemsize
        if entry is None or entry.file_size != expected:
            have = "no such entry" if entry is None else f"{entry.file_size} bytes"
            raise ValueError(f"storage {storage.key:.100} should have {expected} bytes and has {have}")
        storage.start, storage.checksum = _data_start(path, entry, size), entry.CRC

    return _Interpreter(path, locate).run(io.BytesIO(program))


def _entries(path: Path, archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        name = entry.filename
        if name in entries or name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise ValueError(f"{path}: the entry {name!r:.100} is there twice or points outside of the file")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
            raise ValueError(f"{path}: the entry {name!r:.100} is compressed, or larger than the file")
        if name.endswith(".pkl") and entry.file_size > MAX_PICKLE:
            raise ValueError(f"{path}: the pickle {name!r:.100} has more than {MAX_PICKLE} bytes")
        entries[name] = entry
    return entries


def _data_start(path: Path, entry: zipfile.ZipInfo, size: int) -> int:
    """Where an entry's bytes begin: behind its own header, whose length only that header says."""
    with open(path, "rb") as file:
        file.seek(entry.header_offset)
        header = file.read(30)
    start = (
        entry.header_offset
        + 30
        + int.from_bytes(header[26:28], "little")
        + int.from_bytes(header[28:30], "little")
    )
    if not header.startswith(ZIP_START) or start + entry.file_size > size:
        raise ValueError(f"the entry {entry.filename!r:.100} does not lie inside of the file")
    return start


def _read_legacy(path: Path) -> Any:
    size = path.stat().st_size
    with open(path, "rb") as file:
        programs = io.BytesIO(file.read(MAX_PICKLE))
        storages: dict[str, _Storage] = {}

        def note(storage: _Storage) -> None:
            first = storages.setdefault(storage.key, storage)
            if (first.dtype, first.numel) != (storage.dtype, storage.numel):
                raise ValueError(f"storage {storage.key:.100} has two sizes")
            known.append((storage, first))

        known: list[tuple[_Storage, _Storage]] = []
        interpreter = _Interpreter(path, note)
        for _ in range(3):  # magic number, protocol, platform
            interpreter.run(programs)
        content, keys = interpreter.run(programs), interpreter.run(programs)
        position = programs.tell()
        if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
            raise ValueError(f"{path} is damaged: its storages are not those that its tensors need")
        for key in keys:
            storage = storages[str(key)]
            file.seek(position)
            numel = int.from_bytes(file.read(8), "little")
            storage.start = position + 8
            position = storage.start + numel * numpy_dtype(storage.dtype).itemsize
            if numel != storage.numel or position > size:
                raise ValueError(f"{path} is cut short or damaged at storage {key!s:.100}")
        for storage, first in known:
            storage.start = first.start
    return content


class _Interpreter:
    """Carries out the harmless instructions of a pickle."""

    def __init__(self, path: Path, locate: Callable[[_Storage], None]):
        self.path, self.locate = path, locate
        self.checked: set[int] = set()

    def run(self, program: io.BytesIO) -> Any:
        """The object that one pickle builds; `program` is left behind its end."""
        try:
            return self._run(program)
        except (
            ValueError,
            IndexError,
            KeyError,
            TypeError,
            AttributeError,
            UnicodeError,
            OverflowError,
        ) as error:
            reason = (
                f"{type(error).__name__} {error}" if isinstance(error, (IndexError, KeyError)) else str(error)
            )
            raise ValueError(f"{self.path} is damaged or not only tensors: {reason:.500}") from None

    def _run(self, program: io.BytesIO) -> Any:
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def since_mark() -> list[Any]:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        argument: Any
        for opcode, argument, _ in pickletools.genops(program):
            name = opcode.name
            if name in ("PROTO", "FRAME"):
                pass
            elif name == "STOP":
                (result,) = stack
                return result
            elif name == "MARK":
                marks.append(len(stack))
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            elif name in _LITERALS:
                stack.append(argument)
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            elif name == "TUPLE":
                stack.append(tuple(since_mark()))
            elif name == "APPENDS":
                items = since_mark()
                _list(stack[-1]).extend(items)
            elif name == "APPEND":
                item = stack.pop()
                _list(stack[-1]).append(item)
            elif name in ("SETITEMS", "SETITEM"):
                items = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                if len(items) % 2:
                    raise ValueError("a key without a value")
                _dict(stack[-1]).update(zip(items[::2], items[1::2], strict=True))
            elif name == "GLOBAL":
                stack.append(_Global(*argument.split(" ", 1)))
            elif name == "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_Global(module, attribute))
            elif name == "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._call(function, arguments))
            elif (
                name == "BUILD"
            ):  # attributes of an OrderedDict, such as the versions of a state dict's modules
                stack.pop()
                _dict(stack[-1])
            elif name == "BINPERSID":
                stack.append(self._storage(stack.pop()))
            else:
                raise ValueError(f"the pickle instruction {name} is refused")
        raise ValueError("the pickle has no end")

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise ValueError("a call of something that is no name")
        if function == _Global("collections", "OrderedDict") and not arguments:
            return {}
        if function == _Global("torch._utils", "_rebuild_tensor_v2") and 6 <= len(arguments) <= 7:
            return self._tensor(*arguments[:4])
        if function == _Global("torch._utils", "_rebuild_parameter") and isinstance(arguments[0], LazyTensor):
            return arguments[0]
        raise ValueError(f"it would call {function.module}.{function.name}, which is refused")

    def _storage(self, identity: Any) -> _Storage:
        """("storage", type, key, device, number of elements), with a sixth item None in legacy files."""
        if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
            raise ValueError("a reference that is not to a storage")
        _, kind, key, _, numel, *view = identity
        if not isinstance(kind, _Global) or kind.module != "torch" or kind.name not in STORAGES:
            raise ValueError(f"the storage type {getattr(kind, 'name', '?'):.100} is refused")
        if (
            not isinstance(key, str)
            or type(numel) is not int
            or numel < 0
            or any(v is not None for v in view)
        ):
            raise ValueError("a storage without a key or size")
        storage = _Storage(key, STORAGES[kind.name], numel)
        self.locate(storage)
        return storage

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> LazyTensor:
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("a tensor with an impossible place, shape or stride")
        if len(shape) != len(strides):
            raise ValueError("a tensor whose strides do not fit its shape")
        span = 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if offset + span > storage.numel:
            raise ValueError(f"a tensor of shape {list(shape)!s:.100} reaches over the end of its storage")
        dtype, path = numpy_dtype(storage.dtype), self.path

        def read() -> np.ndarray:
            start = storage.start + offset * dtype.itemsize
            values = np.fromfile(path, dtype, span, offset=start)
            if values.size != span:
                raise ValueError(f"{path} is cut short: storage {storage.key} is not whole")
            self._check(storage, values if span == storage.numel else None)
            steps = tuple(step * dtype.itemsize for step in strides)
            return np.lib.stride_tricks.as_strided(values, shape, steps) if span else values.reshape(shape)

        return LazyTensor(tuple(shape), storage.dtype, read, str(path))

    def _check(self, storage: _Storage, values: np.ndarray | None) -> None:
        """The checksum of a storage's bytes, once; `values` are all of them where they have been read already."""
        if storage.checksum is None or storage.start in self.checked:
            return
        if values is not None:
            checksum = zlib.crc32(values.view(np.uint8).data)
        else:
            size = storage.numel * numpy_dtype(storage.dtype).itemsize
            checksum = _crc32(self.path, storage.start, size)
        if checksum != storage.checksum:
            raise ValueError(f"{self.path} is damaged: the checksum of storage {storage.key} does not match")
        self.checked.add(storage.start)


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name in a pickle; it is never looked up."""

    module: str
    name: str


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_LITERALS = (
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
)  # fmt: skip


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"it adds to a {type(value).__name__} as if it were a list")
    return value


def _dict(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"it sets items of a {type(value).__name__} as if it were a dict")
    return value


def _crc32(path: Path, start: int, size: int) -> int:
    checksum = 0
    for chunk in _chunks(path, start, size):
        checksum = zlib.crc32(chunk, checksum)
    return checksum


def _chunks(path: Path, start: int, size: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(start)
        while size > 0 and (chunk := file.read(min(size, 1 << 20))):
            size -= len(chunk)
            yield chunk
