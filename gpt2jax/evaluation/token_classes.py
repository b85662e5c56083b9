"""Groups token ids into classes: by how often they occur, and by what they are as text."""

from __future__ import annotations

import functools

import numpy as np

from gpt2jax.tokenizer.bpe import Tokenizer

# a token belongs to the first class whose bound is at most its fraction of all tokens
FREQUENCY_BOUNDS = (1e-2, 1e-3, 1e-4, 1e-5)
FREQUENCY_CLASSES = (
    "1 in 100 or more often",
    "1 in 1,000",
    "1 in 10,000",
    "1 in 100,000",
    "rarer",
    "never",
)
KINDS = (
    "beginning of a word",
    "inside of a word",
    "number",
    "punctuation",
    "white space",
    "part of a character",
    "end token",
    "no text",
)


def frequency_classes(counts: np.ndarray) -> np.ndarray:
    """Return the index into `FREQUENCY_CLASSES` of every token id, [V], from its number of occurrences [V]."""
    fraction = counts / max(counts.sum(), 1)
    classes = (fraction[:, None] < np.array(FREQUENCY_BOUNDS)).sum(axis=1)
    return np.where(counts > 0, classes, len(FREQUENCY_CLASSES) - 1)


@functools.lru_cache(maxsize=8)
def kind_classes(tokenizer: Tokenizer | None, vocab_size: int, end_token_id: int) -> np.ndarray:
    """Return the index into `KINDS` of every token id, [V]; without a tokenizer only the end token has a kind."""
    kinds = np.full(vocab_size, KINDS.index("no text"))
    if tokenizer is not None:
        special = set(tokenizer.special_tokens.values())
        for token_id in range(min(vocab_size, tokenizer.vocab_size)):
            if token_id not in special:
                try:
                    kinds[token_id] = KINDS.index(_kind(tokenizer.decode_bytes([token_id])))
                except ValueError:  # the vocabulary has a hole here
                    continue
    kinds[end_token_id] = KINDS.index("end token")
    return kinds


def _kind(content: bytes) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return "part of a character"
    stripped = text.strip()
    if not stripped:
        return "white space"
    if any(character.isalpha() for character in stripped):
        return "beginning of a word" if text[0].isspace() else "inside of a word"
    return "number" if any(character.isdigit() for character in stripped) else "punctuation"


def position_classes(length: int) -> tuple[np.ndarray, list[str]]:
    """Return ranges of places in a row that double: the range of each place [T], and the ranges' names, from 1 on."""
    classes = np.log2(np.arange(1, length + 1)).astype(np.int64)
    bounds = [(1 << k, min((2 << k) - 1, length)) for k in range(classes[-1] + 1)]
    return classes, [f"{low}" if low == high else f"{low} to {high}" for low, high in bounds]


def sum_by_class(values: np.ndarray, classes: np.ndarray, count: int) -> np.ndarray:
    """Sum up values [V] by their classes [V] to [count] float64."""
    return np.bincount(classes, weights=values, minlength=count)
