from __future__ import annotations

import math

import numpy as np
import pytest

from gpt2jax.comparison.paired import (
    bootstrap_interval,
    difference_breakdown,
    paired_difference,
    ratio_standard_error,
    win_rate,
)
from gpt2jax.evaluation.accumulators import DocumentSums, TokenScores, loss_breakdown, sum_by_document
from gpt2jax.evaluation.config import EvaluationConfig
from gpt2jax.evaluation.result import Evaluation

LENGTH = 16


def evaluation_of(losses: list[list[float]], correct: list[list[bool]]) -> Evaluation:
    """Make an evaluation with given losses of each document's tokens, which have the ids 0, 1, ... in each."""
    offsets = np.cumsum([0] + [len(row) for row in losses])
    labels = np.concatenate([np.arange(len(row)) for row in losses])
    rank = np.where(np.concatenate(correct), 0, 7)
    loss = np.concatenate(losses).astype(np.float32)
    scores = TokenScores(offsets, labels, labels, loss, rank, np.full(len(loss), 0.5, np.float32))
    none = np.zeros(len(losses), np.int64)
    sums = DocumentSums(
        np.diff(offsets),
        sum_by_document(loss, offsets),
        sum_by_document(rank == 0, offsets, np.int64),
        none,
        none,
        none,
        none,
        none,
        none,
        none > 0,
    )
    breakdown = loss_breakdown(scores, end_token_id=9, sequence_length=LENGTH, vocab_size=10)
    config = EvaluationConfig(LENGTH, "non_overlapping")
    return Evaluation(config, sums, breakdown, False, "", 0.0, scores)


def test_paired_difference_by_hand():
    first = evaluation_of([[2, 2], [4, 4, 4, 4], [1]], [[True, False], [False] * 4, [True]])
    second = evaluation_of([[1, 2], [3, 3, 3, 2], [1]], [[True, True], [True, False, False, False], [False]])
    found = paired_difference(first, second, baseline="a", same_tokens=True, resamples=500, seed=0)
    assert found.difference == pytest.approx((-1 - 5 + 0) / 7)
    residuals = [-1 + 6 / 7 * 2, -5 + 6 / 7 * 4, 0 + 6 / 7 * 1]
    assert found.standard_error == pytest.approx(np.sqrt(3 / 2 * np.square(residuals).sum()) / 7)
    assert found.win_rate == pytest.approx(2.5 / 3)
    assert found.accuracy_difference == pytest.approx((1 + 1 - 1) / 7)
    assert -1.25 <= found.interval[0] <= found.difference <= found.interval[1] <= 0
    assert found.documents == 3 and found.unit == "nats per token"


def test_difference_breakdown_by_hand():
    first = evaluation_of([[2, 2], [4, 4, 4, 4], [1]], [[True, False], [False] * 4, [True]])
    second = evaluation_of([[1, 2], [3, 3, 3, 2], [3]], [[True, True], [True, False, False, False], [False]])
    found = difference_breakdown(first, second, tokenizer=None, end_token_id=9)
    assert [(c["class"], c["tokens"], c["difference"]) for c in found["position"]] == [
        ("1", 3, pytest.approx((-1 - 1 + 2) / 3)),
        ("2 to 3", 3, pytest.approx((0 - 1 - 1) / 3)),
        ("4 to 7", 1, -2),
    ]
    assert [c["fraction"] for c in found["position"]] == pytest.approx([0, 0.5, 0.5])
    # every id occurs once in seven tokens or more often
    assert [(c["class"], c["tokens"], c["fraction"]) for c in found["frequency"]] == [
        ("1 in 100 or more often", 7, 1)
    ]
    assert [c["class"] for c in found["kind"]] == ["no text"]
    # documents of fewer than four tokens are left out where there are longer ones
    assert (
        found["improved"] == [{"document": 1, "tokens": 4, "difference": -1.25}] and found["regressed"] == []
    )
    counts = np.array([5_000, 400, 30, 0, 0, 0, 0, 0, 0, 94_570])
    rare = difference_breakdown(first, second, tokenizer=None, end_token_id=9, token_counts=counts)[
        "frequency"
    ]
    assert [(c["class"], c["tokens"]) for c in rare] == [
        ("1 in 100 or more often", 3),
        ("1 in 1,000", 2),
        ("1 in 10,000", 1),
        ("never", 1),
    ]


def test_ratio_standard_error_by_hand():
    # ratio 12/6 = 2; residuals 2 - 2*2 = -2 and 10 - 2*4 = 2; sqrt(2/1 * (4 + 4)) / 6
    assert ratio_standard_error(np.array([2.0, 10.0]), np.array([2.0, 4.0])) == pytest.approx(4 / 6)
    assert ratio_standard_error(np.array([2.0]), np.array([2.0])) is None


def test_ratio_standard_error_with_equal_sizes_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(size=50)
    expected = values.std(ddof=1) / math.sqrt(50)
    assert ratio_standard_error(8 * values, np.full(50, 8.0)) == pytest.approx(expected)


def test_standard_error_and_interval_cover_the_truth():
    """Over many samples of documents of random length, the 95 % interval holds the true mean about 95 % of
    the time."""
    rng = np.random.default_rng(1)
    inside = {"standard error": 0, "bootstrap": 0}
    for repeat in range(300):
        sizes = rng.integers(10, 100, size=60).astype(float)
        sums = sizes * (0.3 + 0.5 * rng.normal(size=60))
        error = ratio_standard_error(sums, sizes)
        low, high = bootstrap_interval(sums, sizes, resamples=300, seed=repeat)
        assert error is not None
        inside["standard error"] += abs(sums.sum() / sizes.sum() - 0.3) < 1.96 * error
        inside["bootstrap"] += low < 0.3 < high
    assert all(0.90 < count / 300 < 0.98 for count in inside.values()), inside


def test_bootstrap_interval_is_a_function_of_its_seed():
    sums, sizes = np.random.default_rng(0).normal(size=(2, 40)) + [[0], [5]]
    one, same, other = (bootstrap_interval(sums, sizes, resamples=200, seed=seed) for seed in (0, 0, 1))
    assert one == same != other
    constant = bootstrap_interval(np.full(5, 3.0), np.ones(5), resamples=10, seed=0)
    assert constant == (3.0, 3.0)


def test_bootstrap_interval_of_many_documents_needs_little_memory():
    sums, sizes = np.random.default_rng(0).normal(size=2_000_000), np.ones(2_000_000)
    low, high = bootstrap_interval(sums, sizes, resamples=3, seed=0)
    assert -0.01 < low <= high < 0.01


def test_win_rate():
    assert win_rate(np.array([-1.0, -2.0, 0.0, 3.0])) == 0.625


def test_bootstrap_interval_of_few_documents():
    assert bootstrap_interval(np.array([3.0]), np.array([2.0]), resamples=5, seed=0) == (1.5, 1.5)
    # documents without text count for nothing, and a draw of only these has no ratio
    sums, sizes = np.array([3.0, 0, 0]), np.array([2.0, 0, 0])
    assert bootstrap_interval(sums, sizes, resamples=50, seed=0) == (1.5, 1.5)
    assert np.isnan(bootstrap_interval(sums * np.nan, sizes, resamples=5, seed=0)).all()
