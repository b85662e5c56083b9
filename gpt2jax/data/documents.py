"""Tokenized documents: one flat array of ids and where each document begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Documents:
    """Token ids of documents, end to end.

    Attributes:
        tokens: [total] uint16 or int32, without end tokens.
        offsets: [n + 1] int64; document i is `tokens[offsets[i]:offsets[i + 1]]`.
    """

    tokens: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """[n] number of tokens of each document."""
        return np.diff(self.offsets)


def tokenize_documents(texts: Iterable[Any], tokenizer: Any, *, vocab_size: int) -> Documents:
    """Texts (strings, or sequences of token ids) as `Documents`.

    Args:
        texts: list of str, list of id sequences, or a column of a `datasets.Dataset`.
        tokenizer: encodes the strings; may be None when all texts are ids.
        vocab_size: ids must be below it.

    Raises:
        ValueError: there is no text, an id is out of range, or a string came without a tokenizer.
    """
    texts = list(texts)
    if not texts:
        raise ValueError("there are no texts: the data set is empty")
    if all(isinstance(text, str) for text in texts):
        if tokenizer is None:
            raise ValueError("the model has no tokenizer: pass texts as lists of token ids")
        rows = tokenizer.encode_batch(texts)
    else:
        rows = [_as_ids(text, index, tokenizer) for index, text in enumerate(texts)]
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    tokens = np.empty(offsets[-1], np.uint16 if vocab_size <= 1 << 16 else np.int32)
    for index, row in enumerate(rows):
        ids = np.asarray(row, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
            bad = int(ids[(ids < 0) | (ids >= vocab_size)][0])
            raise ValueError(f"text {index} has token id {bad}; the vocabulary has ids 0 to {vocab_size - 1}")
        tokens[offsets[index] : offsets[index + 1]] = ids
    return Documents(tokens, offsets)


def _as_ids(text: Any, index: int, tokenizer: Any) -> Sequence[int] | np.ndarray:
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError("the model has no tokenizer: pass texts as lists of token ids")
        return tokenizer.encode(text)
    ids = np.asarray(text)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"text {index} is neither a string nor a list of token ids: {text!r:.60}")
    return ids
