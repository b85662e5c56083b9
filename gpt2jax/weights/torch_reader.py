"""Files of `torch.save`, zip and legacy, read without torch and without unpickling.

A pickle is a program that may run any code. The interpreter here carries out only the instructions that build dicts,
lists, tuples, strings, numbers and tensors; it refuses all others by name.

Source: torch/serialization.py of PyTorch. Zip: `NAME/data.pkl` and one stored entry `NAME/data/KEY` per storage.
Legacy (before 1.6): five pickles (magic number, protocol, platform, object, storage keys), then for each key the
number of elements in 8 bytes and the elements.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import pickletools
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gpt2jax.weights.mapping import LazyTensor, numpy_dtype

ZIP_START = b"PK\x03\x04"
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number, pickled
MAX_AXES = 32  # of a tensor
MAX_PICKLE = 32_000_000  # bytes; the pickle of the largest GPT-2 with its optimizer has less than one million
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip


@dataclasses.dataclass
class _Storage:
    """A run of numbers in the file; in legacy files its place is known later than its name."""

    key: str
    dtype: str
    numel: int
    start: int = -1
    checksum: int | None = None


def read_torch(path: str | os.PathLike[str]) -> Any:
    """Return what `torch.save` wrote: dicts, lists, tuples, strings, numbers, and an unread `LazyTensor` per tensor.

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
    raise ValueError(
        f"{path} is not a file of torch.save: it begins with the mark of neither of its two formats"
    )


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """Return the tensors of a saved state dict by name.

    Raises:
        ValueError: the file is damaged, or something in it is not a tensor with a name.
    """
    content = read_torch(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold tensors by name, got a {type(content).__name__}")
    return check_state_dict(content, str(path))


def check_state_dict(content: dict[Any, Any], source: str) -> dict[str, LazyTensor]:
    """Return `content`; raise ValueError unless all of it is tensors by name."""
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, LazyTensor):
            raise ValueError(
                f"{source}: {name!s:.100} must be a tensor with a name, got a {type(value).__name__}"
            )
    return content


_ZIP_ERRORS = (
    zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, OSError, EOFError, RuntimeError,
)  # fmt: skip


def _read_zip(path: Path) -> Any:
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = _entries(path, archive, size)
            (pickle_name,) = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
            root = pickle_name.removesuffix("data.pkl")
            program = archive.read(pickle_name)
            order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
    except _ZIP_ERRORS as error:
        raise ValueError(f"{path} is cut short or damaged: {error}") from None
    except ValueError as error:
        message = str(error) if str(path) in str(error) else f"{path} is not a file of torch.save: {error}"
        raise ValueError(message) from None
    if order != b"little":
        raise ValueError(f"{path}: the byte order must be b'little', got {order[:20]!r}")

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
    """Return where an entry's bytes begin: behind the entry's local header, which has a length that it alone says."""
    with open(path, "rb") as file:
        file.seek(entry.header_offset)
        header = file.read(30)
    name_length, extra_length = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    start = entry.header_offset + 30 + name_length + extra_length
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


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name in a pickle; it is never looked up."""

    module: str
    name: str


@dataclasses.dataclass
class PickledObject:
    """An object of another program's class: its name and its fields. The class is never looked up or called."""

    name: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


class _Interpreter:
    """Carries out the harmless instructions of a pickle; `_INSTRUCTIONS` lists them."""

    def __init__(self, path: Path, locate: Callable[[_Storage], None]):
        self.path, self.locate = path, locate
        self.checked: set[int] = set()
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: io.BytesIO) -> Any:
        """Return the object that one pickle builds; `program` is left behind its end."""
        try:
            return self._run(program)
        except (LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
            reason = f"{type(error).__name__} {error}" if isinstance(error, LookupError) else str(error)
            raise ValueError(f"{self.path} is damaged or not only tensors: {reason:.500}") from None

    def _run(self, program: io.BytesIO) -> Any:
        self.stack, self.marks, self.memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                (result,) = self.stack
                return result
            if opcode.name not in _INSTRUCTIONS:
                raise ValueError(f"the pickle instruction {opcode.name} is refused")
            _INSTRUCTIONS[opcode.name](self, argument)
        raise ValueError("the pickle has no end")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def make_tuple(self, count: int) -> None:
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def append(self, items: list[Any]) -> None:
        top = self.stack[-1]
        if not isinstance(top, list):
            raise ValueError(f"it adds to a {type(top).__name__} as if it were a list")
        top.extend(items)

    def set_items(self, items: list[Any]) -> None:
        top = self.stack[-1]
        if not isinstance(top, dict):
            raise ValueError(f"it sets items of a {type(top).__name__} as if it were a dict")
        if len(items) % 2:
            raise ValueError("a key without a value")
        if not all(
            isinstance(key, str | int) for key in items[::2]
        ):  # hashing nested tuples can take forever
            raise ValueError("a key that is neither a text nor a whole number")
        top.update(zip(items[::2], items[1::2], strict=True))

    def set_state(self) -> None:
        """Ignore attributes of an OrderedDict, such as the versions of a state dict's modules; keep an object's."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], PickledObject) and isinstance(state, dict):
            self.stack[-1].fields.update(state)
        else:
            self.set_items([])

    def make_object(self) -> None:
        """Note that an object would be made of a class without arguments, as of a dataclass."""
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, _Global) or arguments != ():
            raise ValueError("an object that is made of something else than the name of a class")
        self.push(PickledObject(f"{kind.module}.{kind.name}"))

    def push_global(self) -> None:
        attribute, module = self.stack.pop(), self.stack.pop()
        self.push(_Global(module, attribute))

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.push(self._call(function, arguments))

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise ValueError("a call of something that is not a function's name")
        if function == _Global("collections", "OrderedDict") and not arguments:
            return {}
        if function == _Global("torch._utils", "_rebuild_tensor_v2") and 6 <= len(arguments) <= 7:
            return self._tensor(*arguments[:4])
        if function == _Global("torch._utils", "_rebuild_parameter") and isinstance(arguments[0], LazyTensor):
            return arguments[0]
        raise ValueError(f"it would call {function.module}.{function.name}, which is refused")

    def _storage(self, identity: Any) -> _Storage:
        """Return a storage by its identity: ("storage", type, key, device, numel), in legacy files None behind."""
        if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
            raise ValueError("a reference that is not to a storage")
        _, kind, key, _, numel, *view = identity
        if not isinstance(kind, _Global) or kind.module != "torch" or kind.name not in STORAGES:
            raise ValueError(f"the storage type {getattr(kind, 'name', '?'):.100} is refused")
        is_whole = isinstance(key, str) and type(numel) is int and numel >= 0
        if not is_whole or any(v is not None for v in view):
            raise ValueError("a storage without a key or size")
        storage = _Storage(key, STORAGES[kind.name], numel)
        self.locate(storage)
        return storage

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> LazyTensor:
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("a tensor with an impossible place, shape or stride")
        if len(shape) != len(strides) or len(shape) > MAX_AXES:
            raise ValueError("a tensor whose strides do not fit its shape")
        span = 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if offset + span > storage.numel or math.prod(shape) > storage.numel:
            raise ValueError(f"a tensor of shape {list(shape)!s:.100} does not fit into its storage")
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
        """Verify the checksum of a storage once; `values` are all of its numbers if they have been read already."""
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


_Instruction = Callable[[_Interpreter, Any], None]


def _pushes(make: Callable[[], Any]) -> _Instruction:
    return lambda machine, argument: machine.push(make())


def _sets_item(machine: _Interpreter, argument: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


def _memorizes(machine: _Interpreter, argument: Any) -> None:
    machine.memo[len(machine.memo) if argument is None else argument] = machine.stack[-1]


_LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")
_INSTRUCTIONS: dict[str, _Instruction] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, argument: None),
    **dict.fromkeys(_LITERALS, lambda machine, argument: machine.push(argument)),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _memorizes),
    **dict.fromkeys(
        ("BINGET", "LONG_BINGET"), lambda machine, argument: machine.push(machine.memo[argument])
    ),
    "NONE": _pushes(lambda: None),
    "NEWTRUE": _pushes(lambda: True),
    "NEWFALSE": _pushes(lambda: False),
    "EMPTY_DICT": _pushes(dict),
    "EMPTY_LIST": _pushes(list),
    "EMPTY_TUPLE": _pushes(tuple),
    "MARK": lambda machine, argument: machine.marks.append(len(machine.stack)),
    "TUPLE": lambda machine, argument: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, argument: machine.make_tuple(1),
    "TUPLE2": lambda machine, argument: machine.make_tuple(2),
    "TUPLE3": lambda machine, argument: machine.make_tuple(3),
    "APPEND": lambda machine, argument: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, argument: machine.append(machine.pop_to_mark()),
    "SETITEM": _sets_item,
    "SETITEMS": lambda machine, argument: machine.set_items(machine.pop_to_mark()),
    "GLOBAL": lambda machine, argument: machine.push(_Global(*argument.split(" ", 1))),
    "STACK_GLOBAL": lambda machine, argument: machine.push_global(),
    "REDUCE": lambda machine, argument: machine.reduce(),
    "NEWOBJ": lambda machine, argument: machine.make_object(),
    "BUILD": lambda machine, argument: machine.set_state(),
    "BINPERSID": lambda machine, argument: machine.push(machine._storage(machine.stack.pop())),
}


def _crc32(path: Path, start: int, size: int) -> int:
    checksum = 0
    with open(path, "rb") as file:
        file.seek(start)
        while size > 0 and (chunk := file.read(min(size, 1 << 20))):
            checksum = zlib.crc32(chunk, checksum)
            size -= len(chunk)
    return checksum
