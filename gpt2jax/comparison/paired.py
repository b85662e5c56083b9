"""Compares two models on the same documents: the difference, how certain it is, and which tokens it comes from.

The documents are the sample. The tokens of one text depend on each other, so a standard error over tokens would be far
too small. A mean per token is a ratio of two sums over documents, and is treated as one.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

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
from gpt2jax.utils.notices import count_noun

CONFIDENCE = 0.95
PER_TOKEN, PER_BYTE = "nats per token", "nats per byte"
# the bootstrap's 95 % interval of a mean of normal values holds the truth in 84 % of samples of 5, in 90 % of 10
FEWEST_DOCUMENTS = 10
MAX_LISTED = 10  # documents that improve most, and as many that regress most
MIN_TOKENS = 16  # the mean over a shorter document is mostly chance


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """The loss of a model minus that of the baseline, on the same documents; negative if the model is better.

    Attributes:
        baseline: name of the baseline.
        unit: of difference, standard error and interval: `PER_TOKEN`, or `PER_BYTE` if the models' tokens differ.
        difference: sum of the differences over all documents, divided by the number of tokens (or bytes).
        standard_error: of the difference, over documents; None for a single document.
        interval: [low, high] by bootstrap over documents, percentile method, at `CONFIDENCE`.
        win_rate: fraction of the documents on which the model has the lower loss; a tie counts half.
        accuracy_difference, accuracy_standard_error: the same for the accuracy; None if the models' tokens differ.
        documents: number of documents.
        resamples: of the bootstrap.
    """

    baseline: str
    unit: str
    difference: float
    standard_error: float | None
    interval: tuple[float, float]
    win_rate: float
    accuracy_difference: float | None
    accuracy_standard_error: float | None
    documents: int
    resamples: int

    @property
    def warning(self) -> str | None:
        """A sentence on what makes the interval unreliable, or None."""
        if self.documents >= FEWEST_DOCUMENTS:
            return None
        documents = count_noun(self.documents, "document")
        advice = f"is too narrow; take at least {FEWEST_DOCUMENTS}"
        return f"the interval of the difference comes from {documents} and {advice}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; None for numbers that are not finite."""
        values = dataclasses.asdict(self) | {"interval": [finite(end) for end in self.interval]}
        values = {name: finite(x) if isinstance(x, float) else x for name, x in values.items()}
        return values | {"confidence": CONFIDENCE, "warning": self.warning}


def paired_difference(
    first: Evaluation, second: Evaluation, *, baseline: str, same_tokens: bool, resamples: int, seed: int
) -> PairedDifference:
    """Compute the difference second minus first, document by document.

    Args:
        first, second: evaluations of the same texts.
        baseline: name of the first.
        same_tokens: both scored the same tokens; otherwise the difference is per byte of text.
        resamples, seed: of the bootstrap.
    """
    a, b = first.per_document, second.per_document
    if same_tokens:
        unit, sizes, differences = PER_TOKEN, a.tokens.astype(np.float64), b.loss - a.loss
    elif first.has_text and second.has_text:
        unit, sizes, differences = PER_BYTE, a.bytes.astype(np.float64), b.text_loss - a.text_loss
    else:
        raise ValueError("models must have a tokenizer each if their token ids differ, got one without")
    correct = b.correct - a.correct
    return PairedDifference(
        baseline=baseline,
        unit=unit,
        difference=float(differences.sum() / sizes.sum()),
        standard_error=ratio_standard_error(differences, sizes),
        interval=bootstrap_interval(differences, sizes, resamples=resamples, seed=seed),
        win_rate=win_rate(differences),
        accuracy_difference=float(correct.sum() / sizes.sum()) if same_tokens else None,
        accuracy_standard_error=ratio_standard_error(correct, sizes) if same_tokens else None,
        documents=first.documents,
        resamples=resamples,
    )


def loss_standard_error(evaluation: Evaluation) -> float | None:
    """Return the standard error of a model's loss per token, over documents."""
    sums = evaluation.per_document
    return finite(ratio_standard_error(sums.loss, sums.tokens))


def ratio_standard_error(sums: np.ndarray, sizes: np.ndarray) -> float | None:
    """Return the standard error of `sums.sum() / sizes.sum()` over documents; None for fewer than two documents.

    Args:
        sums: [n] sum over each document.
        sizes: [n] its number of tokens.

    Source: Cochran 1977, "Sampling Techniques", section 2.11 (the variance of a ratio estimate).
    """
    n = len(sums)
    if n < 2:
        return None
    residuals = sums - sums.sum() / sizes.sum() * sizes
    return float(math.sqrt(n / (n - 1) * np.square(residuals).sum()) / sizes.sum())


def bootstrap_interval(
    sums: np.ndarray, sizes: np.ndarray, *, resamples: int, seed: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Return the percentile interval of `sums.sum() / sizes.sum()` over documents drawn with replacement.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    if len(sums) < 2 or not np.isfinite(sums).all():  # nothing to draw from
        ratio = float(sums.sum() / sizes.sum())
        return ratio, ratio
    import scipy.stats  # 0.5 s, which only a comparison should pay

    def ratio_of_draws(sums: np.ndarray, sizes: np.ndarray, axis: int) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return sums.sum(axis) / sizes.sum(axis)

    with warnings.catch_warnings():
        # a draw of documents without any text has no ratio; it is left out below
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        found = scipy.stats.bootstrap(
            (sums, sizes),
            ratio_of_draws,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=max(1, (1 << 20) // len(sums)),  # 1 Mi indices are 8 MiB
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    draws = found.bootstrap_distribution
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws[~np.isnan(draws)], [tail, 1 - tail])
    return float(low), float(high)


def win_rate(differences: np.ndarray) -> float:
    """Return the fraction of negative differences; zeros count half."""
    return float((differences < 0).mean() + 0.5 * (differences == 0).mean())


# ---- which tokens and documents the difference comes from ----


def difference_breakdown(
    first: Evaluation,
    second: Evaluation,
    *,
    tokenizer: Tokenizer | None,
    end_token_id: int,
    token_counts: np.ndarray | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Split the difference second minus first by position, frequency and kind of token, and by document.

    Args:
        first, second: evaluations that scored the same tokens.
        tokenizer, end_token_id: of both models, to tell the kinds of tokens.
        token_counts: [V] for the frequency classes, see `Evaluation.loss_by_frequency`.

    Returns:
        position, frequency, kind: one dict a class with tokens in it: class, tokens, the mean losses first and second,
            their difference in nats per token, and the class's fraction of the whole difference. Ranges of
            positions double.
        improved, regressed: the documents with the largest differences per token: document, tokens, difference.
    """
    a, b = first.breakdown, second.breakdown
    counts = a.vocabulary_tokens if token_counts is None else token_counts
    by_id = (a.vocabulary_tokens, a.vocabulary_loss, b.vocabulary_loss)
    by_place = (a.position_tokens, a.position_loss, b.position_loss)
    sizes, improved, regressed = first.per_document.tokens, *largest_differences(first, second, MAX_LISTED)
    differences = second.per_document.loss - first.per_document.loss

    def document(index: int) -> dict[str, Any]:
        mean = finite(float(differences[index] / sizes[index]))
        return {"document": index, "tokens": int(sizes[index]), "difference": mean}

    return {
        "position": _by_class(*by_place, *position_classes(first.config.length)),
        "frequency": _by_class(*by_id, frequency_classes(counts), FREQUENCY_CLASSES),
        "kind": _by_class(*by_id, kind_classes(tokenizer, len(counts), end_token_id), KINDS),
        "improved": [document(index) for index in improved],
        "regressed": [document(index) for index in regressed],
    }


def _by_class(
    tokens: np.ndarray, first: np.ndarray, second: np.ndarray, classes: np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the means of each class that has tokens."""
    sums = [sum_by_class(values, classes, len(names)) for values in (tokens, first, second)]
    whole = float((sums[2] - sums[1]).sum())
    return [
        {
            "class": name,
            "tokens": int(count),
            "first": finite(before / count),
            "second": finite(after / count),
            "difference": finite((after - before) / count),
            "fraction": finite((after - before) / whole) if whole else None,
        }
        for name, count, before, after in zip(names, *(values.tolist() for values in sums), strict=True)
        if count
    ]


def largest_differences(first: Evaluation, second: Evaluation, count: int) -> tuple[list[int], list[int]]:
    """Return the documents on which the second model improves most, and those on which it regresses most.

    Documents are ordered by their mean difference per token. Those under `MIN_TOKENS` scored tokens are left out
    unless all are shorter.

    Returns:
        Indices of at most `count` documents each: (difference below 0, largest first; above 0, largest first).
    """
    sizes = first.per_document.tokens
    means = (second.per_document.loss - first.per_document.loss) / np.maximum(sizes, 1)
    candidates = np.flatnonzero((sizes >= min(MIN_TOKENS, int(sizes.max()))) & np.isfinite(means))
    order = candidates[np.argsort(means[candidates], kind="stable")]
    improved = [int(index) for index in order[:count] if means[index] < 0]
    regressed = [int(index) for index in order[::-1][:count] if means[index] > 0]
    return improved, regressed
