"""One model against another on the same documents: by how much it is better, how sure that is, and where it lies."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpt2jax.comparison.statistics import (
    PER_BYTE,
    PER_TOKEN,
    PairedDifference,
    bootstrap_interval,
    ratio_standard_error,
    win_rate,
)
from gpt2jax.evaluation.result import Evaluation, finite
from gpt2jax.evaluation.token_classes import (
    FREQUENCY_CLASSES,
    KINDS,
    frequency_classes,
    kind_classes,
    position_classes,
    sum_by_class,
)
from gpt2jax.tokenizer.bpe import Tokenizer

LARGEST = 10  # documents that are named with the largest gain, and as many with the largest loss
MIN_TOKENS = 16  # of shorter documents the mean is mostly chance


def paired_difference(
    first: Evaluation, second: Evaluation, *, baseline: str, same_tokens: bool, resamples: int, seed: int
) -> PairedDifference:
    """Second less first, document by document.

    Args:
        first, second: evaluations of the same texts.
        baseline: name of the first.
        same_tokens: both scored the same tokens; else the difference is per byte of text.
        resamples, seed: of the bootstrap.
    """
    if same_tokens:
        unit, sizes = PER_TOKEN, first.document_tokens.astype(np.float64)
        differences = second.document_loss - first.document_loss
    else:
        unit, sizes = PER_BYTE, first.document_bytes
        if sizes is None or first.document_text_loss is None or second.document_text_loss is None:
            raise ValueError("models with different token ids need a tokenizer each to be compared")
        differences = second.document_text_loss - first.document_text_loss
    hits = second.document_hits - first.document_hits
    return PairedDifference(
        baseline=baseline,
        unit=unit,
        difference=float(differences.sum() / sizes.sum()),
        standard_error=ratio_standard_error(differences, sizes),
        interval=bootstrap_interval(differences, sizes, resamples=resamples, seed=seed),
        win_rate=win_rate(differences),
        accuracy_difference=float(hits.sum() / sizes.sum()) if same_tokens else None,
        accuracy_standard_error=ratio_standard_error(hits, sizes) if same_tokens else None,
        documents=first.documents,
        resamples=resamples,
    )


def loss_standard_error(evaluation: Evaluation) -> float | None:
    """Standard error of a model's loss per token over documents."""
    return finite(ratio_standard_error(evaluation.document_loss, evaluation.document_tokens))


def where_gain_lies(
    first: Evaluation,
    second: Evaluation,
    *,
    tokenizer: Tokenizer | None,
    end_token_id: int,
    token_counts: np.ndarray | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """The difference second less first, taken apart; negative is a gain. Both scored the same tokens.

    Args:
        first, second: evaluations of the same texts.
        tokenizer, end_token_id: of both models, to tell kinds of tokens.
        token_counts: [V] for the classes of frequency, see `Evaluation.loss_by_frequency`.

    Returns:
        "position", "frequency", "kind": one dict a class with any token in it (class, tokens, the mean losses first
        and second, their difference in nats per token, and the class's share of the whole difference); by position in
        ranges of places that double. "gains" and "losses": the documents with the largest difference per token
        (document, tokens, difference).
    """
    a, b = first.breakdown, second.breakdown
    counts = a.vocabulary_tokens if token_counts is None else token_counts
    kinds = kind_classes(tokenizer, len(counts), end_token_id)
    by_id = (a.vocabulary_tokens, a.vocabulary_loss, b.vocabulary_loss)
    by_place = (a.position_tokens, a.position_loss, b.position_loss)
    return {
        "position": _by_class(*by_place, *position_classes(first.settings.sequence_length)),
        "frequency": _by_class(*by_id, frequency_classes(counts), FREQUENCY_CLASSES),
        "kind": _by_class(*by_id, kinds, KINDS),
        **_documents(first, second),
    }


def _by_class(tokens, first, second, classes, names) -> list[dict[str, Any]]:
    tokens, first, second = (sum_by_class(values, classes, len(names)) for values in (tokens, first, second))
    whole = float((second - first).sum())
    return [
        {
            "class": name,
            "tokens": int(count),
            "first": finite(before / count),
            "second": finite(after / count),
            "difference": finite((after - before) / count),
            "share": finite((after - before) / whole) if whole else None,
        }
        for name, count, before, after in zip(
            names, tokens.tolist(), first.tolist(), second.tolist(), strict=True
        )
        if count
    ]


def _documents(first: Evaluation, second: Evaluation) -> dict[str, list[dict[str, Any]]]:
    gains, losses = largest_differences(first, second, LARGEST)
    sizes = first.document_tokens
    differences = second.document_loss - first.document_loss

    def entry(index: int) -> dict[str, Any]:
        mean = finite(float(differences[index] / sizes[index]))
        return {"document": index, "tokens": int(sizes[index]), "difference": mean}

    return {"gains": [entry(i) for i in gains], "losses": [entry(i) for i in losses]}


def largest_differences(first: Evaluation, second: Evaluation, count: int) -> tuple[list[int], list[int]]:
    """Documents that the second model gains most on, and those it loses most on, by the mean per token.

    Documents under `MIN_TOKENS` scored tokens are left out unless there are no others.

    Returns:
        Indices: (difference below 0, largest first; above 0, largest first), at most `count` each.
    """
    sizes = first.document_tokens
    means = (second.document_loss - first.document_loss) / np.maximum(sizes, 1)
    candidates = np.flatnonzero((sizes >= min(MIN_TOKENS, int(sizes.max()))) & np.isfinite(means))
    order = candidates[np.argsort(means[candidates], kind="stable")]
    gains = [int(index) for index in order[:count] if means[index] < 0]
    losses = [int(index) for index in order[::-1][:count] if means[index] > 0]
    return gains, losses
