"""Tokenized documents: one flat array of ids and where each document begins."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np


@dataclasses.dataclass(frozen=True)
class Documents:
    """Token ids of documents, end to end.

    Attributes:
        tokens: [total] uint16 or int32, without end tokens; may be a `TokenFile`, which reads them from the cache.
        offsets: [n + 1] int64; document i is `tokens[offsets[i]:offsets[i + 1]]`.
        prompts: [n] int64, how many leading tokens of each document are context only, never labels.
            None if no document has any.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prompts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Count the tokens of each document: [n]."""
        return np.diff(self.offsets)

    @property
    def sha256(self) -> str:
        """Return the SHA-256 (hex) of ids, offsets and prompts."""
        arrays = [self.tokens, self.offsets, *([] if self.prompts is None else [self.prompts])]
        digest = hashlib.sha256()
        for array in arrays:
            for begin in range(0, len(array), 1 << 20):  # ids may be in a file that is larger than the memory
                digest.update(np.ascontiguousarray(array[begin : begin + (1 << 20)]).data)
        return digest.hexdigest()


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest dtype that documents of a vocabulary are stored in."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def to_offsets(lengths: np.ndarray) -> np.ndarray:
    """Return where each document begins, and the end: [n] lengths -> [n + 1]."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
