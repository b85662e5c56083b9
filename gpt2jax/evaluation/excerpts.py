"""Where a model gains and loses: the documents with the largest difference, token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from gpt2jax.evaluation.evaluation import Evaluation
from gpt2jax.tokenizer import Tokenizer

MIN_TOKENS = 16  # of shorter documents the mean is mostly chance
MAX_TOKENS = 256  # shown of one document
END_MARK = "■"  # stands for the end token


@dataclasses.dataclass(frozen=True)
class Excerpt:
    """The beginning of a document and the difference of two models' losses on it.

    Attributes:
        document: index in the texts.
        difference: mean per token over the whole document in nats, second model less first.
        tokens: scored tokens of the document.
        pieces: (text, difference in nats) of its first tokens; tokens that share a character are one piece.
    """

    document: int
    difference: float
    tokens: int
    pieces: list[tuple[str, float]]


def largest_differences(
    first: Evaluation, second: Evaluation, tokenizer: Tokenizer | None, *, count: int = 3
) -> dict[str, list[Excerpt]]:
    """The documents that the second model gains most on, and those it loses most on, by the mean per token.

    Documents under `MIN_TOKENS` scored tokens are left out unless there are no others.

    Args:
        first, second: evaluations that scored the same tokens.
        tokenizer: for the text; without one token ids are shown.
        count: at most so many of each.

    Returns:
        {"gains": difference below 0, largest first; "losses": above 0, largest first}.
    """
    sizes = first.document_tokens
    means = (second.document_loss - first.document_loss) / sizes
    candidates = np.flatnonzero(sizes >= min(MIN_TOKENS, int(sizes.max())))
    order = candidates[np.argsort(means[candidates], kind="stable")]
    gains = [index for index in order[:count] if means[index] < 0]
    losses = [index for index in order[::-1][:count] if means[index] > 0]

    def excerpt(index: int) -> Excerpt:
        begin, end = int(first.offsets[index]), int(first.offsets[index + 1])
        shown = slice(begin, min(end, begin + MAX_TOKENS))
        differences = second.token_loss[shown].astype(np.float64) - first.token_loss[shown]
        pieces = _pieces(first.labels[shown].tolist(), differences.tolist(), tokenizer)
        return Excerpt(int(index), float(means[index]), end - begin, pieces)

    return {"gains": [excerpt(i) for i in gains], "losses": [excerpt(i) for i in losses]}


def _pieces(
    token_ids: Sequence[int], differences: Sequence[float], tokenizer: Tokenizer | None
) -> list[tuple[str, float]]:
    """Text and difference of each token; tokens that share a character are one piece, their values added."""
    if tokenizer is None:
        return [(f"{token_id} ", value) for token_id, value in zip(token_ids, differences, strict=True)]
    pieces: list[tuple[str, float]] = []
    pending, total = b"", 0.0
    for token_id, difference in zip(token_ids, differences, strict=True):
        if token_id == tokenizer.end_token_id:
            token = END_MARK.encode()
        else:
            token = tokenizer.decode_bytes([token_id]) if token_id < tokenizer.vocab_size else b"\xff"
        pending, total = pending + token, total + difference
        try:
            text = pending.decode()
        except UnicodeDecodeError as error:
            # a character that may still be completed by the next token waits for it
            if error.reason == "unexpected end of data":
                continue
            text = pending.decode(errors="replace")
        pieces.append((text, total))
        pending, total = b"", 0.0
    if pending:
        pieces.append((pending.decode(errors="replace"), total))
    return pieces
