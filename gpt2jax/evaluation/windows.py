"""Which tokens are scored, and how much context each one sees.

The labels of a document of n tokens are its tokens and the end token behind them: n + 1 labels, the first predicted
from an end token in front. A document with more than T labels does not fit one row. `EvaluationConfig.windows` says
what happens to it:

- "truncate": only the first T - 1 tokens and an end token as last label are scored. A truncated text does not contain
  that end token, so a good model has a high loss there.
- "non_overlapping": rows of T side by side. The first token of a row has almost no context.
- "sliding": rows of T that advance by `stride`. Each row scores only the labels that no earlier row scored, so that
  these have at least T - stride tokens of context.
- "rolling": the n tokens are the labels, without the end token behind them. Rows stand side by side; the last row
  reaches back to be full and scores only what is left (as lm-evaluation-harness does).

Every label is scored exactly once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from gpt2jax.data.documents import Documents
from gpt2jax.tokenizer.bpe import Tokenizer

MIN_WIDTH = 16  # tokens of a batch's rows, unless T is less

# tokens, targets [B, width] int32; of Keras rows also attention_mask [B, width] bool
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Windows:
    """Rows to run, as slices of the label sequences of documents; W rows.

    Attributes:
        document: [W] index of the document.
        begin, end: [W] the slice of labels the row holds.
        score: [W] the first label that the row scores; those before are context.
        offsets: [n + 1] where each document's labels begin in the flat results.
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

    def scored(self, index: int) -> slice:
        """Return the places within row `index` that the row scores."""
        begin = self.begin[index]
        return slice(int(self.score[index] - begin), int(self.end[index] - begin))

    def positions(self) -> np.ndarray:
        """Return the place of each label in the row that scores it, [labels] int32."""
        positions = np.empty(self.offsets[-1], np.int32)
        for document, begin, end, score in zip(self.document, self.begin, self.end, self.score, strict=True):
            start = self.offsets[document]
            positions[start + score : start + end] = np.arange(score - begin, end - begin)
        return positions


def truncate_documents(documents: Documents, length: int) -> Documents:
    """Return the first `length` tokens of each document."""
    kept = np.minimum(documents.lengths, length)
    offsets = np.concatenate([[0], np.cumsum(kept)])
    source = np.arange(offsets[-1]) + np.repeat(documents.offsets[:-1] - offsets[:-1], kept)
    return Documents(documents.tokens[source], offsets)


def encode_first_tokens(tokenizer: Tokenizer, texts: Sequence[str], count: int) -> list[list[int]]:
    """Return the first `count` tokens of each text, from no more of the text than that takes.

    The tokenizer never joins two visible characters across a space: a text that ends before that space has the same
    tokens as the beginning of the whole text.
    """
    rows: list[list[int]] = [[] for _ in texts]
    pending, limit = list(range(len(texts))), 8 * count
    while pending:
        ends = [_split_place(texts[index], limit) for index in pending]
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


def _split_place(text: str, limit: int) -> int:
    """Return the last place within `limit` characters where the tokenizer splits too, or 0."""
    if limit >= len(text):
        return len(text)
    place = text.rfind(" ", 1, limit)
    while place > 0 and not ("!" <= text[place - 1] <= "~" and "!" <= text[place + 1] <= "~"):
        place = text.rfind(" ", 1, place)
    return max(place, 0)


def plan_windows(documents: Documents, sequence_length: int, stride: int) -> Windows:
    """Plan rows of T = `sequence_length` labels, each `stride` further, that score every label once."""
    labels = documents.lengths + 1
    counts = 1 + np.maximum(0, -(-(labels - sequence_length) // stride))
    document = np.repeat(np.arange(len(documents)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = number * stride
    end = np.minimum(begin + sequence_length, labels[document])
    score = np.where(number == 0, 0, begin - stride + sequence_length)
    return Windows(document, begin, end, score, np.concatenate([[0], np.cumsum(labels)]))


def plan_rolling_windows(documents: Documents, sequence_length: int) -> Windows:
    """Plan rows of T = `sequence_length` labels as lm-evaluation-harness does; a document without tokens has no row."""
    labels = documents.lengths
    counts = -(-labels // sequence_length)
    document = np.repeat(np.arange(len(documents)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    end = np.minimum((number + 1) * sequence_length, labels[document])
    begin = np.maximum(end - sequence_length, 0)
    return Windows(document, begin, end, number * sequence_length, np.concatenate([[0], np.cumsum(labels)]))


def window_labels(documents: Documents, windows: Windows, end_token_id: int) -> np.ndarray:
    """Return the labels in order, [labels] int32: an end token behind each document unless the windows are rolling."""
    tokens = documents.tokens.astype(np.int32)
    if windows.offsets[-1] == len(tokens):
        return tokens
    return np.insert(tokens, documents.offsets[1:], end_token_id)


def window_row(documents: Documents, windows: Windows, index: int, width: int, end_token_id: int) -> Batch:
    """Return tokens and targets of row `index`, [width] int32, padded with 0."""
    ids = documents[int(windows.document[index])]
    begin, end = int(windows.begin[index]), int(windows.end[index])
    extended = np.concatenate([[end_token_id], ids, [end_token_id]])
    tokens, targets = np.zeros((2, width), np.int32)
    tokens[: end - begin] = extended[begin:end]
    targets[: end - begin] = extended[begin + 1 : end + 1]
    return {"tokens": tokens, "targets": targets}


def bucketed_batch_size(rows: int, batch_size: int, devices: int = 1) -> int:
    """Return the rows of every batch: `batch_size`, or a power of two if there are fewer; a multiple of `devices`."""
    rows = min(batch_size, 1 << max(rows - 1, 0).bit_length())
    return -(-rows // devices) * devices


def window_batches(
    documents: Documents, windows: Windows, *, sequence_length: int, batch_size: int, end_token_id: int
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yield all rows in batches, the longest rows first: (row indices [at most B], batch [B, width]).

    Rows of one batch are of similar length. The width is T or T halved down to `MIN_WIDTH`: short rows cost less, and
    few shapes have to be compiled.
    """
    widths = [sequence_length]
    while widths[0] >= 2 * MIN_WIDTH:
        widths.insert(0, math.ceil(widths[0] / 2))
    order = np.argsort(-windows.widths, kind="stable")
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = int(windows.widths[chosen].max())
        width = next(step for step in widths if step >= longest)
        rows = [window_row(documents, windows, int(index), width, end_token_id) for index in chosen]
        yield chosen, stack_rows(rows, batch_size)


def stack_rows(rows: list[Batch], batch_size: int) -> Batch:
    """Return rows as a batch; a short batch is filled up with its last row, whose results are not read again."""
    rows = rows + [rows[-1]] * (batch_size - len(rows))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
