"""Sums behind the figures: by document, by position, by token id and by confidence.

An evaluation reads the texts chunk by chunk and keeps only these sums of a chunk: a few numbers a document, and tables
of fixed size. Its memory does not grow with the length of the texts.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence

import numpy as np

from gpt2jax.tokenizer.bpe import Tokenizer

CALIBRATION_BINS = 15


@dataclasses.dataclass(frozen=True, eq=False)
class TokenScores:
    """Scores of every scored token (label) of n documents.

    Attributes:
        offsets: [n + 1] int64; the labels of document i are `offsets[i]:offsets[i + 1]` of the arrays below.
        labels: [tokens] int32 token ids.
        positions: [tokens] int32, place of each label in the row that scored it, from 0.
        loss: [tokens] float32 in nats.
        rank: [tokens] int32, number of tokens that were likelier than the label; 0 for a correct prediction.
        confidence: [tokens] float32, probability of the most likely token.
    """

    offsets: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    loss: np.ndarray
    rank: np.ndarray
    confidence: np.ndarray

    @staticmethod
    def join(parts: Sequence[TokenScores]) -> TokenScores:
        """Concatenate the documents of several."""
        starts = np.cumsum([0] + [part.offsets[-1] for part in parts])
        offsets = [part.offsets[1:] + start for part, start in zip(parts, starts[:-1], strict=True)]
        rest = ("labels", "positions", "loss", "rank", "confidence")
        return TokenScores(
            np.concatenate([[0], *offsets]).astype(np.int64),
            *(np.concatenate([getattr(part, name) for part in parts]) for name in rest),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class DocumentSums:
    """Sums over the scored tokens of each document, [n] each; "text" leaves end tokens out.

    Attributes:
        tokens: int64, scored tokens.
        loss: float64 in nats.
        correct, correct_top5: int64, labels that were the most likely token, or among the five most likely.
        text_loss: float64, the loss of the tokens that are text.
        bytes, characters, words: int64, of the text that the scored tokens stand for; 0 without a tokenizer. Words
            are counted as lm-evaluation-harness does: the parts of a split at `\\s+`.
        correct_on_padding: int64, correct predictions on the padding of the document's Keras row; 0 if the windows
            are not "truncate". See `keras_metrics`.
        truncated: bool, tokens behind the scored ones were left out.
    """

    tokens: np.ndarray
    loss: np.ndarray
    correct: np.ndarray
    correct_top5: np.ndarray
    text_loss: np.ndarray
    bytes: np.ndarray
    characters: np.ndarray
    words: np.ndarray
    correct_on_padding: np.ndarray
    truncated: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def join(parts: Sequence[DocumentSums]) -> DocumentSums:
        """Concatenate the documents of several."""
        names = [field.name for field in dataclasses.fields(DocumentSums)]
        return DocumentSums(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@dataclasses.dataclass(frozen=True, eq=False)
class Breakdown:
    """Sums over all scored tokens, grouped otherwise than by document, float64 each.

    Attributes:
        position_loss, position_tokens: [T], by the place of the label in its row, without the final end tokens.
        vocabulary_loss, vocabulary_correct, vocabulary_tokens: [V], by the id of the label.
        bin_confidence, bin_correct, bin_tokens: [`CALIBRATION_BINS`], by the model's confidence, in bins of equal
            width from 0 to 1.
    """

    position_loss: np.ndarray
    position_tokens: np.ndarray
    vocabulary_loss: np.ndarray
    vocabulary_correct: np.ndarray
    vocabulary_tokens: np.ndarray
    bin_confidence: np.ndarray
    bin_correct: np.ndarray
    bin_tokens: np.ndarray

    def __add__(self, other: Breakdown) -> Breakdown:
        names = [field.name for field in dataclasses.fields(Breakdown)]
        return Breakdown(*(getattr(self, name) + getattr(other, name) for name in names))


def loss_breakdown(
    scores: TokenScores, *, end_token_id: int, sequence_length: int, vocab_size: int
) -> Breakdown:
    """Sum up scores by position, token id and confidence."""
    loss, correct = scores.loss.astype(np.float64), scores.rank == 0
    # end tokens behind truncated texts are all at the last place, and would hide what context is worth there
    is_text = ~_last_end_tokens(scores, end_token_id)
    places = scores.positions[is_text]
    confidence = np.nan_to_num(scores.confidence.astype(np.float64))
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)

    def by_label(weights: np.ndarray | None) -> np.ndarray:
        return np.bincount(scores.labels, weights, minlength=vocab_size).astype(np.float64)

    def by_bin(weights: np.ndarray | None) -> np.ndarray:
        return np.bincount(bins, weights, minlength=CALIBRATION_BINS).astype(np.float64)

    return Breakdown(
        position_loss=np.bincount(places, loss[is_text], minlength=sequence_length),
        position_tokens=np.bincount(places, minlength=sequence_length).astype(np.float64),
        vocabulary_loss=by_label(loss),
        vocabulary_correct=by_label(correct),
        vocabulary_tokens=by_label(None),
        bin_confidence=by_bin(confidence),
        bin_correct=by_bin(correct),
        bin_tokens=by_bin(None),
    )


def _last_end_tokens(scores: TokenScores, end_token_id: int) -> np.ndarray:
    """Mark the end tokens that were put behind documents, not those within texts, [tokens] bool."""
    last = np.zeros(len(scores.labels), bool)
    ends = scores.offsets[1:][np.diff(scores.offsets) > 0] - 1
    last[ends] = scores.labels[ends] == end_token_id
    return last


def sum_by_document(values: np.ndarray, offsets: np.ndarray, dtype: type = np.float64) -> np.ndarray:
    """Sum up [tokens] values to [n]; 0 for a document without scored tokens."""
    sums = np.zeros(len(offsets) - 1, dtype)
    filled = np.diff(offsets) > 0
    if filled.any():
        sums[filled] = np.add.reduceat(values, offsets[:-1][filled], dtype=dtype)
    return sums


def sum_text(scores: TokenScores, tokenizer: Tokenizer | None, vocab_size: int) -> dict[str, np.ndarray]:
    """Return text_loss, bytes, characters and words of `DocumentSums`."""
    offsets = scores.offsets
    if tokenizer is None:
        none = np.zeros(len(offsets) - 1, np.int64)
        return {"text_loss": none.astype(np.float64), "bytes": none, "characters": none, "words": none}
    sizes, characters = text_lengths(tokenizer, vocab_size)
    is_text = sizes[scores.labels] > 0
    words = []
    for begin, end in itertools.pairwise(offsets):
        ids = scores.labels[begin:end][is_text[begin:end]]
        text = tokenizer.decode_bytes(ids.tolist()).decode("utf-8", "ignore")
        words.append(len(re.split(r"\s+", text)) if text else 0)
    return {
        "text_loss": sum_by_document(np.where(is_text, scores.loss, 0), offsets),
        "bytes": sum_by_document(sizes[scores.labels], offsets, np.int64),
        "characters": sum_by_document(characters[scores.labels], offsets, np.int64),
        "words": np.array(words, np.int64),
    }


@functools.lru_cache(maxsize=8)
def text_lengths(tokenizer: Tokenizer, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return bytes and characters of every token id, [V] int32 each; 0 for special tokens and ids without text.

    A character counts at the token in which it begins, so the sum over a text's tokens is its number of characters.
    """
    sizes, characters = np.zeros((2, vocab_size), np.int32)
    special = set(tokenizer.special_tokens.values())
    for token_id in range(min(vocab_size, tokenizer.vocab_size)):
        if token_id in special:
            continue
        try:
            content = tokenizer.decode_bytes([token_id])
        except ValueError:  # the vocabulary has a hole here
            continue
        sizes[token_id] = len(content)
        characters[token_id] = sum(byte & 0xC0 != 0x80 for byte in content)
    return sizes, characters
