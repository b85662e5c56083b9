"""Batches as a pure function of (seed, step): to resume, a run needs its step number and nothing else.

A packing says how documents become rows of T tokens:

- "concat": all documents end to end, an end token before each and after the last, split into windows of T tokens.
  Every token is a label once an epoch; the windows shift by a random amount from epoch to epoch.
- "packed": several whole documents a row, kept apart by segment ids. A document longer than T is split.
- "padded": one document a row, as in the Keras baseline: an end token, the first T - 1 tokens, and the end token as
  last label. Longer documents are truncated, shorter ones padded.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np

from gpt2jax.data.documents import Documents
from gpt2jax.data.packing import Packing, pack_documents
from gpt2jax.utils.validation import check, one_of

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Batches:
    """Training batches of tokenized documents.

    Attributes:
        documents: the tokens.
        packing: "concat", "packed" or "padded".
        sequence_length: T.
        batch_size: B, rows of one batch.
        end_token_id: separates documents.
        seed: of the order; each epoch has its own permutation.

    Raises:
        ValueError: nothing can be predicted, see `check_labels`.
    """

    documents: Documents
    packing: str
    sequence_length: int
    batch_size: int
    end_token_id: int
    seed: int
    _rows: Rows = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_labels(self.documents, self.packing, self.sequence_length)
        rows = make_rows(self.documents, self.packing, self.sequence_length, self.end_token_id)
        object.__setattr__(self, "_rows", rows)

    @property
    def rows(self) -> int:
        """The number of rows of one epoch."""
        # concat: one more than fits, since the shift of an epoch leaves a part of a window at either end
        return len(self._rows) + (self.packing == "concat")

    def batch(self, step: int) -> Batch:
        """Build batch number `step` (from 0): tokens, targets [B, T] int32 and loss_mask [B, T] float32.

        The loss mask is 1 for labels, 0 on padding and in prompts. Packing "packed" adds segment_ids [B, T] int32,
        which count from 1 and are 0 on padding.
        """
        return _stack([self._rows.row(*self._row_and_shift(*place)) for place in self._places(step)])

    def documents_of(self, step: int) -> list[int]:
        """Return the numbers of the documents that have a token in batch number `step`, sorted."""
        found: set[int] = set()
        for place in self._places(step):
            found.update(self._rows.documents_of(*self._row_and_shift(*place)))
        return sorted(found)

    def _places(self, step: int) -> list[tuple[int, int]]:
        """Return (epoch, place in the epoch's order) of each row of a batch."""
        first = step * self.batch_size
        return [divmod(index, self.rows) for index in range(first, first + self.batch_size)]

    def _row_and_shift(self, epoch: int, place: int) -> tuple[int, int]:
        order, shift = _epoch_order(self.seed, epoch, self.rows, self.sequence_length)
        return int(order[place]), shift


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, rows: int, sequence_length: int) -> tuple[np.ndarray, int]:
    """Return the order of the rows [rows] and the shift of the windows in one epoch."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return generator.permutation(rows), int(generator.integers(sequence_length))


def check_long_enough(documents: Documents, what: str = "texts") -> None:
    """Raise ValueError if no document has two tokens, or all documents are nothing but prompts."""
    if len(documents) == 0:
        raise ValueError(f"there are no {what}: the data set is empty")
    if documents.lengths.max() < 2:
        raise ValueError(
            f"all {len(documents)} {what} are shorter than two tokens: there is nothing to predict in them"
        )
    if documents.prompts is not None and (documents.lengths == documents.prompts).all():
        raise ValueError(f"all {len(documents)} completions are empty: there is nothing to predict in them")


def check_labels(documents: Documents, packing: str, sequence_length: int, what: str = "texts") -> None:
    """Raise ValueError if the rows of a packing hold nothing to predict; see `check_long_enough` too."""
    check_long_enough(documents, what)
    if packing == "padded" and documents.prompts is not None and documents.prompts.min() >= sequence_length:
        raise ValueError(
            f"all {len(documents)} prompts fill their rows of {sequence_length} tokens: no completion is left; "
            "a larger sequence_length, shorter prompts or packing='packed' help"
        )


# ---- the rows of each packing: row(index, shift) builds a Batch without the batch axis ----


class ConcatRows:
    """Windows of the stream of all documents, with an end token before each and after the last.

    The stream is never built as a whole: a window is assembled from the tokens that it needs.
    """

    def __init__(self, documents: Documents, sequence_length: int, end_token_id: int):
        self.documents, self.length, self.end = documents, sequence_length, end_token_id
        # the place of each end token in the stream
        self.ends = documents.offsets + np.arange(len(documents) + 1)
        self.total = int(self.ends[-1]) + 1

    def __len__(self) -> int:
        return -(-(self.total - 1) // self.length)

    def row(self, index: int, shift: int = 0) -> Batch:
        """Build the window that begins at index * T - shift; it may begin before the stream or end after it."""
        begin, end = self._span(index, shift)
        ids = self.stream(begin, end)
        return pad_row(ids[:-1], ids[1:], self.length, self._loss_mask(begin + 1, end))

    def stream(self, begin: int, end: int) -> np.ndarray:
        """Return places `begin` to `end` of the stream, int32."""
        first, last = np.searchsorted(self.ends, (begin, end))
        ids = np.full(end - begin, self.end, np.int32)
        is_token = np.ones(end - begin, bool)
        is_token[self.ends[first:last] - begin] = False
        ids[is_token] = self.documents.tokens[begin - first : end - last]
        return ids

    def documents_of(self, index: int, shift: int) -> range:
        """Return the documents with a label in that window."""
        begin, end = self._span(index, shift)
        first, last = np.searchsorted(self.ends, (begin + 1, end - 1))
        return range(int(first) - 1, int(last)) if end - begin > 1 else range(0)

    def _span(self, index: int, shift: int) -> tuple[int, int]:
        start = index * self.length - shift
        begin = min(max(start, 0), self.total)
        return begin, max(begin, min(start + self.length + 1, self.total))

    def _loss_mask(self, begin: int, end: int) -> np.ndarray | float:
        """Return the loss mask of places `begin` to `end` as labels: 0 in a prompt."""
        if self.documents.prompts is None:
            return 1.0
        places = np.arange(begin, end)
        document = np.searchsorted(self.ends, places) - 1  # an end token belongs to the document that it ends
        return (places - self.ends[document] > self.documents.prompts[document]).astype(np.float32)


class PaddedRows:
    """One row for each document, holding its first tokens."""

    def __init__(self, documents: Documents, sequence_length: int, end_token_id: int):
        self.documents, self.length, self.end = documents, sequence_length, end_token_id

    def __len__(self) -> int:
        return len(self.documents)

    def row(self, index: int, shift: int = 0) -> Batch:
        """Build the row of document number `index`."""
        row = document_row(self.documents[index], self.length, self.end)
        if self.documents.prompts is not None:
            row["loss_mask"][: self.documents.prompts[index]] = 0.0
        return row

    def documents_of(self, index: int, shift: int) -> range:
        """Return the document itself."""
        return range(index, index + 1)


class PackedRows:
    """Rows of several documents each, kept apart by segment ids."""

    def __init__(self, documents: Documents, sequence_length: int, end_token_id: int):
        self.documents, self.length, self.end = documents, sequence_length, end_token_id
        self.packing: Packing = pack_documents(documents, sequence_length)

    def __len__(self) -> int:
        return len(self.packing)

    def row(self, index: int, shift: int = 0) -> Batch:
        """Build row number `index` of the packing."""
        row = pad_row(np.empty(0), np.empty(0), self.length)
        row["segment_ids"] = np.zeros(self.length, np.int32)
        at = 0
        for segment, chunk in enumerate(self._chunks(index), start=1):
            document, begin = int(self.packing.documents[chunk]), int(self.packing.begins[chunk])
            size = int(self.packing.lengths[chunk])
            place = slice(at, at + size)
            ids = self.documents[document]
            whole = np.concatenate([[self.end], ids[max(begin - 1, 0) : begin + size], [self.end]])
            whole = whole[1 if begin else 0 :][: size + 1]
            row["tokens"][place], row["targets"][place] = whole[:-1], whole[1:]
            row["segment_ids"][place], row["loss_mask"][place] = segment, 1.0
            if self.documents.prompts is not None:
                row["loss_mask"][at : at + max(int(self.documents.prompts[document]) - begin, 0)][:size] = 0.0
            at += size
        return row

    def documents_of(self, index: int, shift: int) -> list[int]:
        """Return the documents of that row."""
        return self.packing.documents[self.packing.rows[index] : self.packing.rows[index + 1]].tolist()

    def _chunks(self, index: int) -> range:
        return range(int(self.packing.rows[index]), int(self.packing.rows[index + 1]))


Rows = ConcatRows | PackedRows | PaddedRows
_ROWS: dict[str, type[Rows]] = {"concat": ConcatRows, "packed": PackedRows, "padded": PaddedRows}


def make_rows(documents: Documents, packing: str, sequence_length: int, end_token_id: int) -> Rows:
    """Build the rows of a packing.

    Raises:
        ValueError: `packing` is unknown.
    """
    return _ROWS[check("packing", packing, one_of(_ROWS))](documents, sequence_length, end_token_id)


def document_row(ids: np.ndarray, sequence_length: int, end_token_id: int) -> Batch:
    """Build the row of one document: [end] + its first T - 1 tokens as inputs, the same tokens + [end] as targets."""
    row = np.concatenate([[end_token_id], ids[: sequence_length - 1], [end_token_id]]).astype(np.int32)
    return pad_row(row[:-1], row[1:], sequence_length)


def pad_row(
    inputs: np.ndarray, targets: np.ndarray, sequence_length: int, loss_mask: np.ndarray | float = 1.0
) -> Batch:
    """Pad inputs and targets of equal length to T on the right, with loss mask 0 there."""
    row = {
        "tokens": np.zeros(sequence_length, np.int32),
        "targets": np.zeros(sequence_length, np.int32),
        "loss_mask": np.zeros(sequence_length, np.float32),
    }
    size = len(inputs)
    row["tokens"][:size], row["targets"][:size], row["loss_mask"][:size] = inputs, targets, loss_mask
    return row


def sequential_batches(
    documents: Documents, *, packing: str, sequence_length: int, batch_size: int, end_token_id: int
) -> Iterator[Batch]:
    """Yield all rows once and in order, for validation; rows with loss mask 0 fill up the last batch."""
    check_long_enough(documents)
    rows = make_rows(documents, packing, sequence_length, end_token_id)
    built = (rows.row(index) for index in range(len(rows)))
    while chunk := list(itertools.islice(built, batch_size)):
        empty = {name: np.zeros_like(array) for name, array in chunk[0].items()}
        yield _stack(chunk + [empty] * (batch_size - len(chunk)))


def _stack(rows: list[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
