"""Which tokens are scored, and how much context each one sees.

The labels of a document of n tokens are its tokens and the end token behind them: n + 1 labels, the first
predicted from an end token in front. A document longer than T labels does not fit one row:

- "first": only its first T - 1 tokens and an end token as last label, as in the study. Where a document was cut,
  that end token is not in the text, and a good model loses on it.
- "disjoint": rows of T side by side. The first token of a row has almost no context.
- "sliding": rows of T that advance by `stride`; each scores only the labels that no earlier row did, which so have
  at least T - stride tokens of context.
- "rolling": as lm-evaluation-harness counts: the n tokens alone are labels, without an end token behind them; rows
  side by side, the last of which reaches back to be full and scores what is left.

Every label is scored exactly once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from gpt2jax.data.batches import Batch, document_row, pad_row
from gpt2jax.data.documents import Documents
from gpt2jax.tokenizer.bpe import Tokenizer
from gpt2jax.utils.validation import is_integer

LEAST_WIDTH = 16  # tokens of a batch's rows, unless T is less
WINDOWS = ("first", "disjoint", "sliding", "rolling")


@dataclasses.dataclass(frozen=True)
class Windows:
    """Rows to run, as slices of the label sequences of documents; W rows.

    Attributes:
        document: [W] index of the document.
        begin, end: [W] the slice of labels the row holds.
        score: [W] the first label that the row scores; those before are context.
        offsets: [n + 1] place of each document's labels in the flat results.
    """

    document: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    score: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.document)

    @property
    def widths(self) -> np.ndarray:
        """[W] number of labels in each row."""
        return self.end - self.begin

    def positions(self) -> np.ndarray:
        """[labels] index of each label in the row that scores it: tokens of context before it, less one."""
        positions = np.empty(self.offsets[-1], np.int32)
        for document, begin, end, score in zip(self.document, self.begin, self.end, self.score, strict=True):
            start = self.offsets[document]
            positions[start + score : start + end] = np.arange(score - begin, end - begin)
        return positions


def check_windows(windows: str, sequence_length: int, stride: int | None) -> int:
    """The stride in tokens that `windows` works with; for "sliding" half a row unless given.

    Raises:
        ValueError: an unknown name, or a stride that is out of range or has no meaning for `windows`.
    """
    if windows not in WINDOWS:
        raise ValueError(f"windows={windows!r} is not known; known: {', '.join(WINDOWS)}")
    if windows != "sliding":
        if stride is not None:
            raise ValueError(
                f"stride={stride!r} has no meaning with windows={windows!r}; it goes with 'sliding'"
            )
        return sequence_length
    stride = max(1, sequence_length // 2) if stride is None else stride
    if not is_integer(stride) or not 1 <= stride <= sequence_length:
        raise ValueError(
            f"stride={stride!r} must be a whole number from 1 to sequence_length={sequence_length}"
        )
    return stride


def cut_documents(documents: Documents, length: int) -> Documents:
    """The first `length` tokens of each document."""
    kept = np.minimum(documents.lengths, length)
    offsets = np.concatenate([[0], np.cumsum(kept)])
    source = np.arange(offsets[-1]) + np.repeat(documents.offsets[:-1] - offsets[:-1], kept)
    return Documents(documents.tokens[source], offsets)


def encode_beginnings(tokenizer: Tokenizer, texts: Sequence[str], count: int) -> list[list[int]]:
    """The first `count` tokens of each text, from no more of the text than that takes.

    A space between two visible characters begins a new piece for the tokenizer, whatever follows: the tokens of a
    text cut there are the first tokens of the whole.
    """
    rows: list[list[int]] = [[] for _ in texts]
    pending, limit = list(range(len(texts))), 8 * count
    while pending:
        ends = [_cut_place(texts[index], limit) for index in pending]
        encoded = tokenizer.encode_batch(
            [texts[index][:end] for index, end in zip(pending, ends, strict=True)]
        )
        short = []
        for index, end, ids in zip(pending, ends, encoded, strict=True):
            if len(ids) < count and end < len(texts[index]):
                short.append(index)
            else:
                rows[index] = ids[:count]
        pending, limit = short, 4 * limit
    return rows


def _cut_place(text: str, limit: int) -> int:
    """The last place within `limit` characters where the tokenizer cuts too, 0 if there is none."""
    if limit >= len(text):
        return len(text)
    place = text.rfind(" ", 1, limit)
    while place > 0 and not ("!" <= text[place - 1] <= "~" and "!" <= text[place + 1] <= "~"):
        place = text.rfind(" ", 1, place)
    return max(place, 0)


def plan_windows(documents: Documents, sequence_length: int, stride: int) -> Windows:
    """Rows of T = `sequence_length` labels, each `stride` further, that score every label once."""
    labels = documents.lengths + 1
    counts = 1 + np.maximum(0, -(-(labels - sequence_length) // stride))
    document = np.repeat(np.arange(len(documents)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = number * stride
    end = np.minimum(begin + sequence_length, labels[document])
    score = np.where(number == 0, 0, begin - stride + sequence_length)
    return Windows(document, begin, end, score, np.concatenate([[0], np.cumsum(labels)]))


def plan_rolling_windows(documents: Documents, sequence_length: int) -> Windows:
    """Rows of T = `sequence_length` labels as lm-evaluation-harness cuts them; none for a document without tokens."""
    labels = documents.lengths
    counts = -(-labels // sequence_length)
    document = np.repeat(np.arange(len(documents)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    end = np.minimum((number + 1) * sequence_length, labels[document])
    begin = np.maximum(end - sequence_length, 0)
    return Windows(document, begin, end, number * sequence_length, np.concatenate([[0], np.cumsum(labels)]))


def window_row(documents: Documents, windows: Windows, index: int, width: int, end_token_id: int) -> Batch:
    """Row `index`: tokens, targets [width] int32, weights [width] float32, 1 where a label is scored."""
    ids = documents[int(windows.document[index])]
    begin, end = int(windows.begin[index]), int(windows.end[index])
    around = np.concatenate([[end_token_id], ids, [end_token_id]])
    row = pad_row(around[begin:end], around[begin + 1 : end + 1], width)
    row["loss_mask"][: int(windows.score[index]) - begin] = 0.0
    return row


def study_row(ids: np.ndarray, sequence_length: int, end_token_id: int) -> Batch:
    """A document as Keras fed it: `document_row` and a `mask` [T] bool of the keys that attention may see.

    The study's row was [end] + tokens + [end] + padding, of which inputs are all but the last and targets all
    but the first. So a short document's own end token is an input too: nothing is asked of it in the loss,
    but what the model predicts there and on the padding behind it counts in Keras' accuracy.
    """
    row = document_row(ids, sequence_length, end_token_id)
    if len(ids) + 1 < sequence_length:
        row["tokens"][len(ids) + 1] = end_token_id
    row["mask"] = np.arange(sequence_length) < len(ids) + 2
    return row


def bucketed_batch_size(rows: int, batch_size: int, devices: int = 1) -> int:
    """Rows of every batch: `batch_size`, or the next power of two where there are fewer; a multiple of `devices`."""
    rows = min(batch_size, 1 << max(rows - 1, 0).bit_length())
    return -(-rows // devices) * devices


def row_batches(
    documents: Documents, windows: Windows, *, sequence_length: int, batch_size: int, end_token_id: int
) -> Iterator[tuple[np.ndarray, Batch]]:
    """All rows in batches: (row indices [at most B], batch [B, width]), the longest rows first.

    Rows of one batch are of similar length. The width is T or T halved down to `LEAST_WIDTH`, so that short rows cost
    less and there are few shapes to compile.
    """
    ladder = [sequence_length]
    while ladder[0] >= 2 * LEAST_WIDTH:
        ladder.insert(0, math.ceil(ladder[0] / 2))
    order = np.argsort(-windows.widths, kind="stable")
    for chosen in _chunks(order, batch_size):
        longest = int(windows.widths[chosen].max())
        width = next(step for step in ladder if step >= longest)
        rows = [window_row(documents, windows, int(index), width, end_token_id) for index in chosen]
        yield chosen, _stack(rows, batch_size)


def study_batches(
    documents: Documents, *, sequence_length: int, batch_size: int, end_token_id: int
) -> Iterator[tuple[np.ndarray, Batch]]:
    """The rows of Keras in the order of the documents: (row indices [at most B], batch [B, T])."""
    for chosen in _chunks(np.arange(len(documents)), batch_size):
        rows = [study_row(documents[int(index)], sequence_length, end_token_id) for index in chosen]
        yield chosen, _stack(rows, batch_size)


def _chunks(indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _stack(rows: list[Batch], batch_size: int) -> Batch:
    """Rows as a batch; a short last one is filled up with its last row, whose results are not read again."""
    rows = rows + [rows[-1]] * (batch_size - len(rows))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
