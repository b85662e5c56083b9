"""Batches as a pure function of (seed, step): resuming needs the step number and nothing else.

Three layouts:

- "windows": all documents end to end, an end token before each and after the last, cut into windows of T tokens.
  Every token is a label once an epoch; the cut moves by a random amount from epoch to epoch.
- "packed": whole documents (cut only where they are longer than T), several in a row, kept apart by segment ids.
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
from gpt2jax.data.packing import Packing, pack_documents

LAYOUTS = ("windows", "documents", "packed")

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
        ValueError: there is nothing to predict: no document has two tokens, or all of them are prompts.
    """

    documents: Documents
    layout: str
    sequence_length: int
    batch_size: int
    end_token_id: int
    seed: int
    _rows: Rows = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_long_enough(self.documents)
        rows = make_rows(self.documents, self.layout, self.sequence_length, self.end_token_id)
        object.__setattr__(self, "_rows", rows)

    @property
    def rows(self) -> int:
        """Rows of one epoch."""
        # windows: one more than fits, since the first window of an epoch is cut short by that epoch's shift
        return len(self._rows) + (self.layout == "windows")

    def batch(self, step: int) -> Batch:
        """Batch number `step` (from 0): tokens, targets [B, T] int32 and weights [B, T] float32, 0 on padding.

        With layout "packed" also segment_ids [B, T] int32, from 1 on, 0 on padding.
        """
        return _stack([self._row(*where) for where in self._places(step)])

    def documents_of(self, step: int) -> list[int]:
        """Numbers of the documents that have a token in batch number `step`, sorted."""
        found: set[int] = set()
        for epoch, index in self._places(step):
            row, shift = self._chosen(epoch, index)
            found.update(self._rows.documents_of(row, shift))
        return sorted(found)

    def _places(self, step: int) -> list[tuple[int, int]]:
        """(epoch, place in its order) of each row of a batch."""
        first = step * self.batch_size
        return [divmod(index, self.rows) for index in range(first, first + self.batch_size)]

    def _chosen(self, epoch: int, index: int) -> tuple[int, int]:
        order, shift = _epoch(self.seed, epoch, self.rows, self.sequence_length)
        return int(order[index]), shift

    def _row(self, epoch: int, index: int) -> Batch:
        return self._rows.row(*self._chosen(epoch, index))


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, rows: int, sequence_length: int) -> tuple[np.ndarray, int]:
    """Order of the rows [rows] and shift of the windows in one epoch."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return generator.permutation(rows), int(generator.integers(sequence_length))


def check_long_enough(documents: Documents, what: str = "texts") -> None:
    """Raises ValueError where no document has two tokens, or nothing but prompts."""
    if len(documents) == 0:
        raise ValueError(f"there are no {what}: the data set is empty")
    if documents.lengths.max() < 2:
        raise ValueError(
            f"all {len(documents)} {what} are shorter than two tokens: there is nothing to predict in them"
        )
    if documents.prompts is not None and (documents.lengths == documents.prompts).all():
        raise ValueError(f"all {len(documents)} completions are empty: there is nothing to predict in them")


# ---- rows of each layout: row(index, shift) -> Batch without the batch axis ----


class WindowRows:
    """Windows of the stream of all documents, an end token before each and after the last.

    The stream is not made: a window is put together from the tokens that it needs.
    """

    def __init__(self, documents: Documents, sequence_length: int, end_token_id: int):
        self.documents, self.length, self.end = documents, sequence_length, end_token_id
        # where in the stream each end token stands
        self.ends = documents.offsets + np.arange(len(documents) + 1)
        self.total = int(self.ends[-1]) + 1

    def __len__(self) -> int:
        return -(-(self.total - 1) // self.length)

    def row(self, index: int, shift: int = 0) -> Batch:
        """The window that begins `shift` before index * T; it may lie before the stream or end behind it."""
        begin, end = self._span(index, shift)
        ids = self.stream(begin, end)
        return pad_row(ids[:-1], ids[1:], self.length, self._weights(begin + 1, end))

    def stream(self, begin: int, end: int) -> np.ndarray:
        """Places `begin` to `end` of the stream, int32."""
        first, last = np.searchsorted(self.ends, (begin, end))
        ids = np.full(end - begin, self.end, np.int32)
        is_token = np.ones(end - begin, bool)
        is_token[self.ends[first:last] - begin] = False
        ids[is_token] = self.documents.tokens[begin - first : end - last]
        return ids

    def documents_of(self, index: int, shift: int) -> range:
        """Documents with a label in that window."""
        begin, end = self._span(index, shift)
        first, last = np.searchsorted(self.ends, (begin + 1, end - 1))
        return range(int(first) - 1, int(last)) if end - begin > 1 else range(0)

    def _span(self, index: int, shift: int) -> tuple[int, int]:
        start = index * self.length - shift
        begin = min(max(start, 0), self.total)
        return begin, max(begin, min(start + self.length + 1, self.total))

    def _weights(self, begin: int, end: int) -> np.ndarray | float:
        """Weights of the places `begin` to `end` as labels: 0 in a prompt."""
        if self.documents.prompts is None:
            return 1.0
        places = np.arange(begin, end)
        document = np.searchsorted(self.ends, places) - 1  # an end token belongs to the document that it ends
        return (places - self.ends[document] > self.documents.prompts[document]).astype(np.float32)


class DocumentRows:
    """One row a document, its first tokens."""

    def __init__(self, documents: Documents, sequence_length: int, end_token_id: int):
        self.documents, self.length, self.end = documents, sequence_length, end_token_id

    def __len__(self) -> int:
        return len(self.documents)

    def row(self, index: int, shift: int = 0) -> Batch:
        """Document number `index`."""
        row = document_row(self.documents[index], self.length, self.end)
        if self.documents.prompts is not None:
            row["weights"][: self.documents.prompts[index]] = 0.0
        return row

    def documents_of(self, index: int, shift: int) -> range:
        """The document itself."""
        return range(index, index + 1)


class PackedRows:
    """Rows of several documents each, kept apart by segment ids."""

    def __init__(self, documents: Documents, sequence_length: int, end_token_id: int):
        self.documents, self.length, self.end = documents, sequence_length, end_token_id
        self.packing: Packing = pack_documents(documents, sequence_length)

    def __len__(self) -> int:
        return len(self.packing)

    def row(self, index: int, shift: int = 0) -> Batch:
        """Row number `index` of the packing."""
        row = pad_row(np.empty(0), np.empty(0), self.length)
        row["segment_ids"] = np.zeros(self.length, np.int32)
        at = 0
        for segment, piece in enumerate(self._pieces(index), start=1):
            document, begin = int(self.packing.documents[piece]), int(self.packing.begins[piece])
            size = int(self.packing.lengths[piece])
            place = slice(at, at + size)
            ids = self.documents[document]
            whole = np.concatenate([[self.end], ids[max(begin - 1, 0) : begin + size], [self.end]])
            whole = whole[1 if begin else 0 :][: size + 1]
            row["tokens"][place], row["targets"][place] = whole[:-1], whole[1:]
            row["segment_ids"][place], row["weights"][place] = segment, 1.0
            if self.documents.prompts is not None:
                row["weights"][at : at + max(int(self.documents.prompts[document]) - begin, 0)][:size] = 0.0
            at += size
        return row

    def documents_of(self, index: int, shift: int) -> list[int]:
        """The documents of that row."""
        return self.packing.documents[self.packing.rows[index] : self.packing.rows[index + 1]].tolist()

    def _pieces(self, index: int) -> range:
        return range(int(self.packing.rows[index]), int(self.packing.rows[index + 1]))


Rows = WindowRows | DocumentRows | PackedRows
_ROWS: dict[str, type[Rows]] = {"windows": WindowRows, "documents": DocumentRows, "packed": PackedRows}


def make_rows(documents: Documents, layout: str, sequence_length: int, end_token_id: int) -> Rows:
    """The rows of a layout.

    Raises:
        ValueError: the layout is none of `LAYOUTS`.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not known; known: {', '.join(LAYOUTS)}")
    return _ROWS[layout](documents, sequence_length, end_token_id)


def document_row(ids: np.ndarray, sequence_length: int, end_token_id: int) -> Batch:
    """One document as the study had it: [end] + its first T - 1 tokens + [end], split into inputs and targets."""
    row = np.concatenate([[end_token_id], ids[: sequence_length - 1], [end_token_id]]).astype(np.int32)
    return pad_row(row[:-1], row[1:], sequence_length)


def pad_row(
    inputs: np.ndarray, targets: np.ndarray, sequence_length: int, weights: np.ndarray | float = 1.0
) -> Batch:
    """Inputs and targets of equal length, filled up to T on the right with weight 0."""
    row = {
        "tokens": np.zeros(sequence_length, np.int32),
        "targets": np.zeros(sequence_length, np.int32),
        "weights": np.zeros(sequence_length, np.float32),
    }
    size = len(inputs)
    row["tokens"][:size], row["targets"][:size], row["weights"][:size] = inputs, targets, weights
    return row


def sequential_batches(
    documents: Documents, *, layout: str, sequence_length: int, batch_size: int, end_token_id: int
) -> Iterator[Batch]:
    """All rows once and in order, for validation; the last batch is filled up with rows of weight 0."""
    check_long_enough(documents)
    rows = make_rows(documents, layout, sequence_length, end_token_id)
    made = (rows.row(index) for index in range(len(rows)))
    while chunk := list(itertools.islice(made, batch_size)):
        empty = {name: np.zeros_like(array) for name, array in chunk[0].items()}
        yield _stack(chunk + [empty] * (batch_size - len(chunk)))


def _stack(rows: list[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
