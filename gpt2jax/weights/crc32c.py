"""CRC-32C at the speed of memory in NumPy.

The register after a run of words is linear in the register before and in the words: each contributes itself, moved on
by what follows. So a long run can be folded, row by row, into a short one that has the same register: each row is the
row before, moved on by the length of a row, plus the next words.

Source: Castagnoli's polynomial as in RFC 3720, appendix B.4; TensorFlow's mask as in tensorflow/core/lib/hash/crc32c.h.
"""

from __future__ import annotations

import functools

import numpy as np

POLYNOMIAL = 0x82F63B78  # reflected
ROWS = (
    1 << 14,
    1 << 7,
)  # words; rows of the first length, and what is computed of them, stay in a core's cache


def masked_crc32c(data: np.ndarray | bytes) -> int:
    """TensorFlow's checksum of bytes: the CRC-32C rotated and offset."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: np.ndarray | bytes) -> int:
    """The CRC-32C of bytes."""
    values = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8)
    whole = values.size // 4 * 4
    words = values[:whole].view("<u4")
    for length in ROWS:
        words = _fold(words, length)
    begin = np.array([0xFFFFFFFF], np.uint32)
    register = _run(0, words.view(np.uint8)) ^ int(_apply(_power(whole), begin)[0])
    return _run(register, values[whole:]) ^ 0xFFFFFFFF


def _run(register: int, values: np.ndarray) -> int:
    """The register after a few bytes."""
    table = _byte_table()
    for byte in values:
        register = int(table[(register ^ int(byte)) & 0xFF]) ^ register >> 8
    return register


def _fold(words: np.ndarray, length: int) -> np.ndarray:
    """At most `length` words that lead from a register of zero to the same register."""
    if words.size <= length:
        return words
    first = words.size % length or length
    row = np.zeros(length, np.uint32)
    row[length - first :] = words[:first]  # zeros ahead change nothing
    low, high = _move_tables(4 * length)
    moved_low, moved_high = np.empty_like(row), np.empty_like(row)
    for following in words[first:].reshape(-1, length):
        np.take(low, row & 0xFFFF, out=moved_low, mode="clip")
        np.take(high, row >> 16, out=moved_high, mode="clip")
        row = moved_low ^ moved_high ^ following
    return row


@functools.cache
def _move_tables(count: int) -> tuple[np.ndarray, np.ndarray]:
    """[65536] uint32 each: what the low and the high half of a register become by `count` zero bytes."""
    halves = np.arange(1 << 16, dtype=np.uint32)
    return _apply(_power(count), halves), _apply(_power(count), halves << np.uint32(16))


@functools.cache
def _byte_table() -> np.ndarray:
    """[256] uint32: what a register with these low 8 bits becomes by one byte, the other bits aside."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(POLYNOMIAL), table >> 1)
    return table


@functools.lru_cache(maxsize=256)
def _power(count: int) -> np.ndarray:
    """[32] uint32: what each bit of a register becomes by `count` zero bytes."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    result, step = bits, _byte_table()[bits & 0xFF] ^ bits >> 8
    while count:
        if count & 1:
            result = _apply(step, result)
        step = _apply(step, step)
        count >>= 1
    return result


def _apply(columns: np.ndarray, registers: np.ndarray) -> np.ndarray:
    """The linear map with these images of the 32 bits, of each register."""
    result = np.zeros_like(registers)
    for bit, column in enumerate(columns):
        result ^= np.where(registers >> np.uint32(bit) & 1, column, np.uint32(0))
    return result
