"""Packing: documents put into rows of T tokens so that little of a row is left empty.

A document becomes [end] + its tokens with its tokens + [end] as labels; what is longer than T is cut into pieces of
T, each of which begins at position 0 and sees nothing of the one before. Pieces that share a row carry segment ids, by
which attention keeps them apart, so that the loss of each is what it would be alone.

The rows are filled by best fit, longest piece first: within about one row in a hundred of the least possible number
for documents of mixed lengths. Source: Johnson 1973, "Near-optimal bin packing algorithms".
"""

from __future__ import annotations

import bisect
import dataclasses

import numpy as np

from gpt2jax.data.documents import Documents, to_offsets


@dataclasses.dataclass(frozen=True)
class Packing:
    """Which piece of which document stands in which row.

    Attributes:
        documents: [pieces] document of each piece, the pieces of a row side by side.
        begins: [pieces] where in [end] + tokens + [end] it begins.
        lengths: [pieces] its labels, at most T.
        rows: [rows + 1] row r holds the pieces rows[r] to rows[r + 1].
    """

    documents: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows) - 1


def pack_documents(documents: Documents, sequence_length: int) -> Packing:
    """Packs documents into rows of `sequence_length` tokens; the same documents give the same rows."""
    labels = documents.lengths + 1
    pieces = -(-labels // sequence_length)
    owner = np.repeat(np.arange(len(documents)), pieces)
    begins = (np.arange(len(owner)) - np.repeat(to_offsets(pieces)[:-1], pieces)) * sequence_length
    lengths = np.minimum(labels[owner] - begins, sequence_length)
    order = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(order), np.int64)
    row_of[order] = _best_fit(lengths[order].tolist(), sequence_length)
    by_row = np.argsort(row_of, kind="stable")
    counts = np.bincount(row_of)
    return Packing(owner[by_row], begins[by_row], lengths[by_row], to_offsets(counts))


def _best_fit(lengths: list[int], room: int) -> list[int]:
    """The row of each piece: the fullest one that still has room for it, else a new one."""
    open_rows: dict[int, list[int]] = {}  # by the room that is left
    rooms: list[int] = []  # the keys of it that have rows, sorted
    rows, count = [], 0
    for length in lengths:
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            row, left, count = count, room - length, count + 1
        else:
            left = rooms[at]
            row = open_rows[left].pop()
            if not open_rows[left]:
                del rooms[at]
            left -= length
        rows.append(row)
        if left:
            same = open_rows.setdefault(left, [])
            if not same:
                bisect.insort(rooms, left)
            same.append(row)
    return rows
