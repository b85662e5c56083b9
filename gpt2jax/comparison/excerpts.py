"""Shows the documents on which two models differ most, token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from gpt2jax.comparison.paired import largest_differences
from gpt2jax.evaluation.result import Evaluation
from gpt2jax.tokenizer.bpe import Tokenizer

MAX_TOKENS = 256  # shown of one document
END_MARK = "■"  # stands for the end token


@dataclasses.dataclass(frozen=True)
class Excerpt:
    """The beginning of a document, and the difference of two models' losses on it.

    Attributes:
        document: index in the texts.
        difference: mean per token over the whole document in nats, second model minus first.
        tokens: scored tokens of the document.
        pieces: (text, difference in nats) of its first tokens; tokens that share a character are one piece.
    """

    document: int
    difference: float
    tokens: int
    pieces: list[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class Excerpts:
    """The documents with the largest differences, largest first: improved (below 0) and regressed (above 0)."""

    improved: list[Excerpt]
    regressed: list[Excerpt]


def make_excerpts(
    first: Evaluation, second: Evaluation, tokenizer: Tokenizer | None, *, count: int = 3
) -> Excerpts:
    """Show the documents with the largest differences, see `largest_differences`.

    Args:
        first, second: evaluations that scored the same tokens, with the scores of every token.
        tokenizer: of both models; None shows token ids.
        count: the most documents of each kind.
    """
    a, b = first.per_token, second.per_token
    if a is None or b is None:
        raise ValueError("per_token must be True in evaluations of which excerpts are shown, got False")

    def excerpt(index: int) -> Excerpt:
        begin, end = int(a.offsets[index]), int(a.offsets[index + 1])
        shown = slice(begin, min(end, begin + MAX_TOKENS))
        differences = b.loss[shown].astype(np.float64) - a.loss[shown]
        mean = (second.per_document.loss[index] - first.per_document.loss[index]) / (end - begin)
        pieces = _pieces(a.labels[shown].tolist(), differences.tolist(), tokenizer)
        return Excerpt(index, float(mean), end - begin, pieces)

    return Excerpts(*([excerpt(i) for i in indices] for indices in largest_differences(first, second, count)))


def _pieces(
    token_ids: Sequence[int], differences: Sequence[float], tokenizer: Tokenizer | None
) -> list[tuple[str, float]]:
    """Return text and difference of each token; tokens that share a character are one piece with the sum of both."""
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
            # the next token may complete the character
            if error.reason == "unexpected end of data":
                continue
            text = pending.decode(errors="replace")
        pieces.append((text, total))
        pending, total = b"", 0.0
    if pending:
        pieces.append((pending.decode(errors="replace"), total))
    return pieces
