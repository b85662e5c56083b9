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
from collections.abc import Iterable
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
    contents = [_content(text) for text in evaluation]
    whole = sum(max(len(content) - SHINGLE + 1, 0) for content in contents)
    sampled = max(1, -(-whole // MAX_SHINGLES))
    own = [_shingles(content, sampled) for content in contents]
    sizes = np.array([len(shingles) for shingles in own], np.int64)
    flat = np.concatenate([*own, np.empty(0, np.uint64)])
    document = np.repeat(np.arange(len(own)), sizes)
    order = np.argsort(flat, kind="stable")
    flat, document = flat[order], document[order]
    exact_of: dict[bytes, list[int]] = {}
    for index, content in enumerate(contents):
        if content:
            exact_of.setdefault(_digest(content), []).append(index)
    found = np.zeros(len(flat), bool)
    best = np.zeros(len(own))
    nearest = np.full(len(own), -1, np.int64)
    exact = np.zeros(len(own), bool)
    count = 0
    for count, text in enumerate(training, start=1):
        content = _content(text)
        for index in exact_of.get(_digest(content), []):
            if not exact[index]:
                exact[index], best[index], nearest[index] = True, 1.0, count - 1
        shingles = _shingles(content, sampled)
        begins, ends = (np.searchsorted(flat, shingles, side) for side in ("left", "right"))
        found_in = np.flatnonzero(ends > begins)
        if not len(found_in):
            continue
        places = np.concatenate([np.arange(begins[i], ends[i]) for i in found_in])
        found[places] = True
        shared = np.bincount(document[places], minlength=len(own))
        resemblance = shared / np.maximum(sizes + len(shingles) - shared, 1)
        better = (resemblance > best) & ~exact
        best[better], nearest[better] = resemblance[better], count - 1
    contained = np.bincount(document[found], minlength=len(own)) / np.maximum(sizes, 1)
    contained = np.where(exact, 1.0, contained)
    listed = [i for i in np.lexsort((-best, -contained))[:MAX_LISTED].tolist() if contained[i] > 0]
    return {
        "training_documents": count,
        "documents": len(own),
        "exact": int(exact.sum()),
        "near": int((exact | (best >= NEAR)).sum()),
        "mostly_contained": int((contained >= MOSTLY).sum()),
        "contained": float(found.mean()) if len(found) else 0.0,
        "sampled": sampled,
        "listed": [
            {
                "document": i,
                "contained": float(contained[i]),
                "training_document": int(nearest[i]),
                "resemblance": float(best[i]),
            }
            for i in listed
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
