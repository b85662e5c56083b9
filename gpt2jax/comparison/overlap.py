"""Finds evaluation texts that a model may have seen in training: exact and near duplicates.

Texts are compared by their letters and digits, in lower case. A shingle is a run of `SHINGLE` of these (about six
words). The training texts are read once and not kept: memory holds the evaluation texts' shingles only. In large sets
only the shingles whose hash is a multiple of some number are taken, the same ones in all texts.

Source: Broder 1997, "On the resemblance and containment of documents" (shingles, resemblance, containment, sampling by
hash modulo m).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

SHINGLE = 32  # bytes of letters and digits; a power of two
MAX_SHINGLES = 1 << 23  # held of the evaluation texts: 64 MiB
NEAR = 0.8  # resemblance from which two texts are near duplicates
MOSTLY = 0.5  # fraction of a text's shingles in training texts from which it is mostly contained
MAX_LISTED = 20

_BASE = 0x9E3779B97F4A7C15  # odd, so that products keep all bits


def text_overlap(training: Iterable[Any], evaluation: Iterable[Any]) -> dict[str, Any]:
    """Measure how much of the evaluation texts is in the training texts.

    Args:
        training, evaluation: strings, or lists of token ids; strings are compared with strings, lists with lists.

    Returns:
        training_documents, documents: how many there are.
        exact: evaluation texts that equal a training text, apart from case, spaces and punctuation.
        near: exact duplicates, and texts whose resemblance (shingles in both over shingles in either) with one
            training text is at least `NEAR`.
        mostly_contained: evaluation texts with at least `MOSTLY` of their shingles in training texts.
        contained: fraction of all the evaluation texts' shingles that are in training texts.
        sampled: 1 in so many shingles was compared.
        listed: at most `MAX_LISTED` texts with the largest fractions, if above 0: document, contained,
            training_document, resemblance.
    """
    texts = _EvaluationTexts([_content(text) for text in evaluation])
    count = 0
    for count, text in enumerate(training, start=1):
        texts.compare(count - 1, _content(text))
    return {"training_documents": count, **texts.figures()}


class _EvaluationTexts:
    """The evaluation texts' shingles, and what was found of them in the training texts so far.

    Attributes:
        sampled: 1 in so many shingles is compared.
        sizes: [n] number of shingles of each text.
        shingles, document: [all] the shingles of all texts, sorted, and the text that each is from.
        found: [all] whether the shingle is in a training text.
        exact: [n] whether the text equals a training text.
        resemblance, nearest: [n] the largest resemblance with one training text, and that text's number, or -1.
    """

    def __init__(self, contents: Sequence[bytes]) -> None:
        total = sum(max(len(content) - SHINGLE + 1, 0) for content in contents)
        self.sampled = max(1, -(-total // MAX_SHINGLES))
        own = [_shingles(content, self.sampled) for content in contents]
        self.sizes = np.array([len(shingles) for shingles in own], np.int64)
        flat = np.concatenate([*own, np.empty(0, np.uint64)])
        order = np.argsort(flat, kind="stable")
        self.shingles, self.document = flat[order], np.repeat(np.arange(len(own)), self.sizes)[order]
        self.found = np.zeros(len(flat), bool)
        self.exact = np.zeros(len(own), bool)
        self.resemblance = np.zeros(len(own))
        self.nearest = np.full(len(own), -1, np.int64)
        self._exact_of: dict[bytes, list[int]] = {}
        for index, content in enumerate(contents):
            if content:
                self._exact_of.setdefault(_digest(content), []).append(index)

    def compare(self, number: int, content: bytes) -> None:
        """Look for training text `number` in all of them."""
        for index in self._exact_of.get(_digest(content), []):
            if not self.exact[index]:
                self.exact[index], self.resemblance[index], self.nearest[index] = True, 1.0, number
        shingles = _shingles(content, self.sampled)
        begins, ends = (np.searchsorted(self.shingles, shingles, side) for side in ("left", "right"))
        found_in = np.flatnonzero(ends > begins)
        if not len(found_in):
            return
        places = np.concatenate([np.arange(begins[i], ends[i]) for i in found_in])
        self.found[places] = True
        common = np.bincount(self.document[places], minlength=len(self.sizes))
        resemblance = common / np.maximum(self.sizes + len(shingles) - common, 1)
        better = (resemblance > self.resemblance) & ~self.exact
        self.resemblance[better], self.nearest[better] = resemblance[better], number

    def figures(self) -> dict[str, Any]:
        """Return the figures of `text_overlap`, except the number of training texts."""
        held = np.bincount(self.document[self.found], minlength=len(self.sizes))
        contained = np.where(self.exact, 1.0, held / np.maximum(self.sizes, 1))
        largest = np.lexsort((-self.resemblance, -contained))[:MAX_LISTED].tolist()
        return {
            "documents": len(self.sizes),
            "exact": int(self.exact.sum()),
            "near": int((self.exact | (self.resemblance >= NEAR)).sum()),
            "mostly_contained": int((contained >= MOSTLY).sum()),
            "contained": float(self.found.mean()) if len(self.found) else 0.0,
            "sampled": self.sampled,
            "listed": [
                {
                    "document": i,
                    "contained": float(contained[i]),
                    "training_document": int(self.nearest[i]),
                    "resemblance": float(self.resemblance[i]),
                }
                for i in largest
                if contained[i] > 0
            ],
        }


def _content(text: Any) -> bytes:
    """Return the bytes that are compared: letters and digits in lower case, or four bytes a token id."""
    if isinstance(text, str):
        return re.sub(r"[\W_]+", "", text.lower()).encode("utf-8", "surrogatepass")
    return np.asarray(text, "<u4").tobytes()


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:16]


def _shingles(content: bytes, sampled: int) -> np.ndarray:
    """Return the hashes of the different shingles that are multiples of `sampled`, sorted."""
    count = len(content) - SHINGLE + 1
    if count < 1:
        return np.empty(0, np.uint64)
    hashes, power, size = np.frombuffer(content, np.uint8).astype(np.uint64) + np.uint64(1), _BASE, 1
    while size < SHINGLE:  # the hash of a run follows from those of its halves; products wrap around
        hashes = hashes[:-size] * np.uint64(power) + hashes[size:]
        power, size = power * power % 2**64, 2 * size
    hashes = hashes ^ (hashes >> np.uint64(29))
    if sampled > 1:
        hashes = hashes[hashes % np.uint64(sampled) == 0]
    return np.unique(hashes)
