"""Packing: fill rows of T tokens with several documents each, so that little of a row stays empty.

A document becomes [end] + its tokens as inputs and its tokens + [end] as labels. A longer one is split into chunks of
T, each of which begins at position 0 and does not see the chunk before. Chunks that share a row carry segment ids, by
which attention keeps them apart, so that the loss of each is what it would be alone.

Rows are filled by best fit, longest chunk first: for documents of mixed lengths that takes about 1 % more rows than
the least possible number. Source: Johnson 1973, "Near-optimal bin packing algorithms".
"""

from __future__ import annotations

import bisect
import dataclasses

import numpy as np

from gpt2jax.data.documents import Documents, to_offsets


@dataclasses.dataclass(frozen=True)
class Packing:
    """The chunks of documents in each row.

    Attributes:
        documents: [chunks] document of each chunk, the chunks of a row side by side.
        begins: [chunks] its start in [end] + tokens + [end].
        lengths: [chunks] its number of labels, at most T.
        rows: [rows + 1] row r holds the chunks rows[r] to rows[r + 1].
    """

    documents: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows) - 1


def pack_documents(documents: Documents, sequence_length: int) -> Packing:
    """Pack documents into rows of `sequence_length` tokens; the same documents give the same rows."""
    labels = documents.lengths + 1
    chunks = -(-labels // sequence_length)
    owner = np.repeat(np.arange(len(documents)), chunks)
    begins = (np.arange(len(owner)) - np.repeat(to_offsets(chunks)[:-1], chunks)) * sequence_length
    lengths = np.minimum(labels[owner] - begins, sequence_length)
    order = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(order), np.int64)
    row_of[order] = _best_fit(lengths[order].tolist(), sequence_length)
    by_row = np.argsort(row_of, kind="stable")
    counts = np.bincount(row_of)
    return Packing(owner[by_row], begins[by_row], lengths[by_row], to_offsets(counts))


def _best_fit(lengths: list[int], room: int) -> list[int]:
    """Return the row of each chunk: the fullest row that has room for it, else a new one."""
    open_rows: dict[int, list[int]] = {}  # by the room left in them
    rooms: list[int] = []  # the keys of `open_rows` that have rows, sorted
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
