from __future__ import annotations

import math

import numpy as np
import pytest

from gpt2jax.comparison.statistics import bootstrap_interval, ratio_standard_error, win_rate


def test_ratio_standard_error_by_hand():
    # ratio 12/6 = 2; residuals 2 - 2*2 = -2 and 10 - 2*4 = 2; sqrt(2/1 * (4 + 4)) / 6
    assert ratio_standard_error(np.array([2.0, 10.0]), np.array([2.0, 4.0])) == pytest.approx(4 / 6)
    assert ratio_standard_error(np.array([2.0]), np.array([2.0])) is None


def test_with_equal_sizes_it_is_the_standard_error_of_the_mean():
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


def test_bootstrap_is_a_function_of_its_seed_and_not_of_its_chunks(monkeypatch):
    sums, sizes = np.random.default_rng(0).normal(size=(2, 40)) + [[0], [5]]
    one, same, other = (bootstrap_interval(sums, sizes, resamples=200, seed=seed) for seed in (0, 0, 1))
    assert one == same != other
    constant = bootstrap_interval(np.full(5, 3.0), np.ones(5), resamples=10, seed=0)
    assert constant == (3.0, 3.0)


def test_many_documents_need_little_memory():
    sums, sizes = np.random.default_rng(0).normal(size=2_000_000), np.ones(2_000_000)
    low, high = bootstrap_interval(sums, sizes, resamples=3, seed=0)
    assert -0.01 < low <= high < 0.01


def test_win_rate():
    assert win_rate(np.array([-1.0, -2.0, 0.0, 3.0])) == 0.625
