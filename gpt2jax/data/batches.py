"""Batches as a pure function of (seed, step): resuming needs the step number and nothing else.

Two layouts:

- "windows": all documents end to end, an end token before each and after the last, cut into windows of T tokens.
  Every token is a label once an epoch; the cut moves by a random amount from epoch to epoch.
- "documents": the study's. One row a document: end token, its first T - 1 tokens, and the end token as last label.
  What is longer is cut, what is shorter is padded.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np

from gpt2jax.data.documents import Documents

LAYOUTS = ("windows", "documents")

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Batches:
    """Training batches of tokenized documents.

    Attributes:
        documents: the tokens.
        layout: one of `LAYOUTS`.
        sequence_length: T.
        batch_size: B, rows of one batch.
        end_token_id: separates documents.
        seed: of the order; each epoch has its own permutation.

    Raises:
        ValueError: no document has two tokens, so that there is nothing to predict.
    """

    documents: Documents
    layout: str
    sequence_length: int
    batch_size: int
    end_token_id: int
    seed: int
    _stream: np.ndarray = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_long_enough(self.documents)
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r} is not known; known: {', '.join(LAYOUTS)}")
        stream = (
            join_documents(self.documents, self.end_token_id) if self.layout == "windows" else np.empty(0)
        )
        object.__setattr__(self, "_stream", stream)

    @property
    def rows(self) -> int:
        """Rows of one epoch."""
        if self.layout == "documents":
            return len(self.documents)
        # one more than fits, since the first window of an epoch is cut short by that epoch's shift
        return -(-(len(self._stream) - 1) // self.sequence_length) + 1

    def batch(self, step: int) -> Batch:
        """Batch number `step` (from 0): tokens, targets [B, T] int32 and weights [B, T] float32, 0 on padding."""
        first = step * self.batch_size
        rows = [self._row(*divmod(index, self.rows)) for index in range(first, first + self.batch_size)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, epoch: int, index: int) -> Batch:
        order, shift = _epoch(self.seed, epoch, self.rows, self.sequence_length)
        chosen = int(order[index])
        if self.layout == "documents":
            return document_row(self.documents[chosen], self.sequence_length, self.end_token_id)
        return self._window(chosen * self.sequence_length - shift)

    def _window(self, start: int) -> Batch:
        """The window of the stream that begins at `start`, which may lie before the stream or end behind it."""
        length = self.sequence_length
        begin, end = max(start, 0), min(start + length + 1, len(self._stream))
        ids = self._stream[begin:end]
        return pad_row(ids[:-1], ids[1:], length)


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, rows: int, sequence_length: int) -> tuple[np.ndarray, int]:
    """Order of the rows [rows] and shift of the windows in one epoch."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return generator.permutation(rows), int(generator.integers(sequence_length))


def check_long_enough(documents: Documents) -> None:
    """Raises ValueError where no document has two tokens."""
    if len(documents) == 0:
        raise ValueError("there are no texts: the data set is empty")
    if documents.lengths.max() < 2:
        raise ValueError(
            f"all {len(documents)} texts are shorter than two tokens: there is nothing to predict in them"
        )


def join_documents(documents: Documents, end_token_id: int) -> np.ndarray:
    """[total + n + 1] int32: the documents with an end token before each and after the last."""
    stream = np.full(len(documents.tokens) + len(documents) + 1, end_token_id, np.int32)
    places = np.arange(len(documents.tokens)) + np.repeat(np.arange(len(documents)) + 1, documents.lengths)
    stream[places] = documents.tokens
    return stream


def document_row(ids: np.ndarray, sequence_length: int, end_token_id: int) -> Batch:
    """One document as the study had it: [end] + its first T - 1 tokens + [end], split into inputs and targets."""
    row = np.concatenate([[end_token_id], ids[: sequence_length - 1], [end_token_id]]).astype(np.int32)
    return pad_row(row[:-1], row[1:], sequence_length)


def pad_row(inputs: np.ndarray, targets: np.ndarray, sequence_length: int) -> Batch:
    """Inputs and targets of equal length, filled up to T on the right with weight 0."""
    row = {
        "tokens": np.zeros(sequence_length, np.int32),
        "targets": np.zeros(sequence_length, np.int32),
        "weights": np.zeros(sequence_length, np.float32),
    }
    size = max(len(inputs), 0)
    row["tokens"][:size], row["targets"][:size], row["weights"][:size] = inputs, targets, 1.0
    return row


def sequential_batches(
    documents: Documents, *, layout: str, sequence_length: int, batch_size: int, end_token_id: int
) -> Iterator[Batch]:
    """All rows once and in order, for validation; the last batch is filled up with rows of weight 0."""
    check_long_enough(documents)
    if layout == "documents":
        count = len(documents)
        rows = (document_row(documents[i], sequence_length, end_token_id) for i in range(count))
    else:
        stream = join_documents(documents, end_token_id)
        starts = range(0, len(stream) - 1, sequence_length)
        cuts = (stream[start : start + sequence_length + 1] for start in starts)
        rows = (pad_row(cut[:-1], cut[1:], sequence_length) for cut in cuts)
    empty = np.empty(0, np.int32)
    while chunk := list(itertools.islice(rows, batch_size)):
        chunk += [pad_row(empty, empty, sequence_length)] * (batch_size - len(chunk))
        yield {name: np.stack([row[name] for row in chunk]) for name in chunk[0]}
