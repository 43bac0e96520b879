"""Intervals: of a median over few runs, and of a share of them."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist

import numpy as np

_RESAMPLES = 10_000


def median_interval(
    values: Sequence[float] | np.ndarray, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the median.

        quantiles (1 ± confidence)/2 of the medians of 10 000 resamples with replacement

    With few values it is too short: over 5 the interval mostly spans all of them, and yet misses
    the true median in 2 · 2⁻⁵ = 6 % of all studies, when all 5 lie on one side of it.

    Args:
        values: one a run; Inf stands for a run that diverged and is larger than any other.
        confidence: in (0, 1).

    Returns:
        (low, high); (NaN, NaN) for fewer than two values, which say nothing about the spread.

    Raises:
        ValueError: for a NaN, which has no place in an order.

    Example:

    >>> from kerasgrad.remedies.intervals import median_interval
    >>> median_interval([0.1, 0.2, 0.3, 0.4, float("inf")])
    (0.1, inf)

    Source: Efron and Tibshirani (1993), "An introduction to the bootstrap", chapter 13.
    """
    values = np.asarray(values, np.float64)
    if np.isnan(values).any():
        raise ValueError(
            "median_interval needs values that can be put in order. Received a NaN. Pass Inf for a "
            "run that diverged."
        )
    n = len(values)
    if n < 2:
        return np.nan, np.nan
    picks = np.random.default_rng(0).integers(n, size=(_RESAMPLES, n))
    medians = np.median(values[picks], axis=1)
    # One of the medians as it is: between two of them, Inf would make a NaN.
    low, high = np.quantile(
        medians, [(1 - confidence) / 2, (1 + confidence) / 2], method="inverted_cdf"
    )
    return float(low), float(high)


def wilson_interval(successes: int, runs: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a success rate.

        (p + z²/2n ± z sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n),    p = successes/n, n = runs

    Args:
        successes, runs: how many of how many.
        confidence: in (0, 1); z is the normal quantile of (1 + confidence)/2.

    Returns:
        (low, high), both in [0, 1]; (NaN, NaN) without a run.

    Example:

    >>> from kerasgrad.remedies.intervals import wilson_interval
    >>> low, high = wilson_interval(5, 5)  # Five of five is no proof of always.
    >>> round(low, 2), high
    (0.57, 1.0)

    Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference".
    """
    if not runs:
        return np.nan, np.nan
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, z2 = successes / runs, z * z / runs
    middle = p + z2 / 2
    spread = sqrt(z2 * (p * (1 - p) + z2 / 4))
    # At both ends the formula is exact, and its floats are not.
    low = (middle - spread) / (1 + z2) if successes else 0.0
    high = (middle + spread) / (1 + z2) if successes < runs else 1.0
    return low, high
