"""How sure a figure is: means per token over documents, their standard errors, and paired differences.

The documents are the sample: the tokens of one text depend on each other, so that a standard error over tokens would
be far too small. A mean per token is a ratio of two sums over documents, and is treated as one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

CONFIDENCE = 0.95
PER_TOKEN, PER_BYTE = "nats per token", "nats per byte"


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """A model against the baseline on the same documents, second less first: negative is better than the baseline.

    Attributes:
        baseline: name of the model that it is compared with.
        unit: of difference, standard error and interval: `PER_TOKEN`, or `PER_BYTE` between models that cut
            texts into different tokens.
        difference: sum of the losses' differences over all documents, over the sum of tokens (or bytes).
        standard_error: of it, over documents; None for a single document.
        interval: [low, high], bootstrap over documents, percentile method, `CONFIDENCE`.
        win_rate: share of the documents on which the model has the lower loss; a tie counts half.
        accuracy_difference, accuracy_standard_error: the same for accuracy; None where tokens differ.
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

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not a finite number is None."""
        values = dataclasses.asdict(self) | {"interval": list(self.interval), "confidence": CONFIDENCE}
        return {name: _finite(value) for name, value in values.items()}


def ratio_standard_error(sums: np.ndarray, sizes: np.ndarray) -> float | None:
    """Standard error of `sums.sum() / sizes.sum()`, the documents being the sample; None for fewer than two.

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
    """Percentile interval of `sums.sum() / sizes.sum()` when documents are drawn anew with replacement.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    generator = np.random.default_rng(seed)
    n = len(sums)
    at_once = max(1, (1 << 20) // n)  # 1 Mi indices are 8 MiB
    ratios = []
    for start in range(0, resamples, at_once):
        chosen = generator.integers(n, size=(min(at_once, resamples - start), n))
        drawn_sizes = sizes[chosen].sum(axis=1)
        # a draw of documents without a byte of text has no ratio
        ratios.append((sums[chosen].sum(axis=1) / np.maximum(drawn_sizes, 1))[drawn_sizes > 0])
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    return float(low), float(high)


def win_rate(differences: np.ndarray) -> float:
    """Share of negative differences; zeros count half."""
    return float((differences < 0).mean() + 0.5 * (differences == 0).mean())


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
