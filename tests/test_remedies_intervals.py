"""Intervals, against SciPy and against every resample there is."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from kerasgrad.remedies.intervals import median_interval, wilson_interval

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("runs", [1, 2, 5, 17])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_wilson_is_scipys(runs, confidence):
    for successes in range(runs + 1):
        expected = stats.binomtest(successes, runs).proportion_ci(confidence, method="wilson")
        found = wilson_interval(successes, runs, confidence)
        assert found == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert 0 <= found[0] <= successes / runs <= found[1] <= 1


def test_without_runs_there_is_no_interval():
    assert np.isnan(wilson_interval(0, 0)).all()
    assert np.isnan(median_interval([])).all()
    assert np.isnan(median_interval([0.3])).all()


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_the_bootstrap_is_that_of_all_resamples(n):
    """Every one of the n^n resamples, in place of ten thousand random ones."""
    values = np.random.default_rng(n).lognormal(size=n)
    medians = [np.median(picks) for picks in itertools.product(values, repeat=n)]
    expected = np.quantile(medians, [0.025, 0.975], method="inverted_cdf")
    assert median_interval(values) == tuple(expected)


def test_the_bootstrap_is_scipys():
    values = np.random.default_rng(0).lognormal(size=40)
    expected = stats.bootstrap(
        [values], np.median, n_resamples=20_000, method="percentile", random_state=1
    ).confidence_interval
    spread = np.sort(values)
    # Both are order statistics, or halfway between two: at most one place apart.
    for found, other in zip(median_interval(values), expected, strict=True):
        assert abs(np.searchsorted(spread, found) - np.searchsorted(spread, other)) <= 1


def test_inf_is_larger_than_any_other():
    assert median_interval([1.0, 2.0, 3.0, 4.0, math.inf]) == (1.0, math.inf)
    assert median_interval([math.inf] * 3) == (math.inf, math.inf)
    with pytest.raises(ValueError, match="Received a NaN"):
        median_interval([1.0, math.nan])
