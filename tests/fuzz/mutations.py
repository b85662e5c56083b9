"""Ways to damage a file: its bytes, the values of its JSON, and what lies packed inside it."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

# what stands where another value is expected
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 1.5, -0.0, 1e308, float("nan"), float("inf")),
    *(2**31, 2**32 + 1, 2**63, -(2**63), 10**30, 800_000_000),
    *(
        "",
        " ",
        "a",
        "a" * 5000,
        "\0",
        "\ud800",
        "\x1b[31m",
        "é日😀",
        "../../etc/passwd",
        "<|endoftext|>",
        "gpt2",
    ),
    *([], {}, [[]], [{}], {"": {}}, {"a": 1}, [None], ["a", 1], [0] * 50, {"content": []}),
)
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**48, 2**63 - 1, 2**64 - 1)
_UNPACKERS = ((b"\x1f\x8b", gzip), (b"BZh", bz2), (b"\xfd7zXZ", lzma))


def mutate(content: bytes, random: Random) -> bytes:
    """Return a file's content with one to three damages, drawn from `random`."""
    ways: list[Callable[[bytes, Random], bytes]] = [damage_bytes]
    if is_zip := content[:4] == b"PK\x03\x04":
        ways += [_damage_member] * 2
    if any(content.startswith(mark) for mark, _ in _UNPACKERS):
        ways += [_damage_packed] * 2
    if not is_zip and _header_length(content):
        ways += [_damage_header] * 2
    if content.lstrip()[:1] in (b"{", b"["):
        ways += [damage_json] * 4
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        content = random.choice(ways)(content, random)
    return content


def damage_bytes(content: bytes, random: Random) -> bytes:
    """Flip bits, cut, repeat, swap, insert, or write a number of extreme size."""
    size = len(content)
    start, length = random.randrange(size + 1), random.choice((1, 2, 4, 8, 16, 64, 256, 1024))
    other = random.randrange(size + 1)
    chunk = content[start : start + length]
    way = random.randrange(9)
    if way == 0:
        return content[:start]
    if way == 1:
        return content[:start] + content[start + length :]
    if way == 2:
        return content[:start] + chunk * random.choice((2, 2, 3, 100)) + content[start + length :]
    if way == 3:
        low, high = sorted((start, other))
        end = min(low + length, high)
        parts = ((high, high + length), (end, high), (low, end), (high + length, size))
        return content[:low] + b"".join(content[begin:stop] for begin, stop in parts)
    if way == 4:
        return content[:start] + random.randbytes(length) + content[start:]
    if way == 5:
        width = random.choice((1, 2, 4, 8))
        number = random.choice(NUMBERS) & (2 ** (8 * width) - 1)
        order = random.choice(("little", "big"))
        return content[:start] + number.to_bytes(width, order) + content[start + width :]
    if way == 6:
        return content[:start] + random.randbytes(len(chunk)) + content[start + length :]
    damaged, edge = bytearray(content), min(size, 128)  # the edges hold the marks, sizes and places
    for _ in range(random.choice((1, 1, 2, 8)) if size else 0):
        place = random.choice(
            (random.randrange(size), random.randrange(edge), size - 1 - random.randrange(edge))
        )
        damaged[place] ^= 1 << random.randrange(8)
    return bytes(damaged)


def damage_json(content: bytes, random: Random) -> bytes:
    """Change a value, a name or an entry of a JSON file, or of a line of one; nest it too deeply now and then."""
    if random.random() < 0.01:
        return random.choice((b"[", b'{"a":', b'{"model":[')) * 100_000
    try:
        return _damage_text(content, random)
    except (ValueError, RecursionError):
        lines = content.splitlines(keepends=True)
        place = random.randrange(len(lines) or 1)
        try:
            lines[place] = _damage_text(lines[place], random) + b"\n"
        except (ValueError, RecursionError, IndexError):
            return damage_bytes(content, random)
        return b"".join(lines)


def _damage_text(text: bytes, random: Random) -> bytes:
    root = [json.loads(text)]
    places = _places(root)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        parent, key = random.choice(places)
        _damage_value(parent, key, places, random)
    return json.dumps(root[0] if root else None, ensure_ascii=random.random() < 0.7).encode(
        "utf-8", "surrogatepass"
    )


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    """Return (object or list, name or index) of all values; of long lists and objects only some."""
    found: list[tuple[Any, Any]] = []
    waiting: list[Any] = [root]
    while waiting:
        parent = waiting.pop()
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        for key in keys[:20] + keys[20:][-3:]:
            found.append((parent, key))
            if isinstance(parent[key], (dict, list)):
                waiting.append(parent[key])
    return found


def _damage_value(parent: Any, key: Any, places: list[tuple[Any, Any]], random: Random) -> None:
    try:
        value = parent[key]
    except LookupError:  # removed before
        return
    way = random.randrange(8)
    if way == 0:
        del parent[key]
    elif way == 1 and isinstance(parent, dict):
        parent[str(random.choice(VALUES))] = value
    elif way == 2 and isinstance(parent, list):
        parent += [value] * random.choice((1, 2, 1000))
    elif way == 3:
        other, name = random.choice(places)
        if isinstance(other, dict) or name < len(other):
            parent[key] = json.loads(json.dumps(other.get(name) if isinstance(other, dict) else other[name]))
    elif way == 4:
        parent[key] = random.choice(([value], {"a": value}, str(value), [value, value]))
    else:
        parent[key] = random.choice(VALUES)


def _header_length(content: bytes) -> int:
    """Return the length of the JSON at the beginning of a safetensors file; 0 if it is another file."""
    length = int.from_bytes(content[:8], "little")
    return length if content[8:9] == b"{" and 0 < length < len(content) else 0


def _damage_header(content: bytes, random: Random) -> bytes:
    length = _header_length(content)
    header = damage_json(content[8 : 8 + length], random)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _damage_member(content: bytes, random: Random) -> bytes:
    """Damage one member of a zip archive, whose checksum is that of the damaged content."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError, ValueError):
        return damage_bytes(content, random)
    name = random.choice(list(members) or [""])
    members[name] = mutate(members.get(name, b""), random)
    packed = io.BytesIO()
    with zipfile.ZipFile(
        packed, "w", random.choice((zipfile.ZIP_STORED,) * 5 + (zipfile.ZIP_DEFLATED,))
    ) as archive:
        for name, member in members.items():
            archive.writestr(name or "a", member)
    return packed.getvalue()


def _damage_packed(content: bytes, random: Random) -> bytes:
    try:
        module = next(module for mark, module in _UNPACKERS if content.startswith(mark))
        return module.compress(mutate(module.decompress(content), random))
    except (StopIteration, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError):
        return damage_bytes(content, random)
