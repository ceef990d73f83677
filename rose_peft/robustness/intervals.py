"""Intervals around measured figures. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from .errors import RobustnessError


class Interval(NamedTuple):
    """An estimate and the bounds of its interval, all in the unit of the data."""

    value: float
    low: float
    high: float


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise RobustnessError(f"confidence={confidence}: must lie strictly between 0 and 1; 0.95 is usual.")


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Estimate a share with its score interval (Wilson 1927), which stays inside [0, 1] and works for small `n`.

    Args:
        successes: Number of successes, 0 to `n`.
        n: Number of independent trials, at least 1.
        confidence: Coverage of the interval, strictly between 0 and 1.

    Returns:
        The share `successes / n` and its bounds, as fractions.

    Raises:
        RobustnessError: If there are no trials, or the counts or the confidence are out of range.
    """
    _check_confidence(confidence)
    if n < 1:
        raise RobustnessError(f"n={n}: a share needs at least one trial.")
    if not 0 <= successes <= n:
        raise RobustnessError(f"successes={successes}: must lie between 0 and n={n}.")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the bound is exactly 0 or 1 in exact arithmetic; rounding must not push it past the share.
    return Interval(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def _bootstrap(values: np.ndarray, confidence: float, resamples: int, seed: int) -> Interval:
    _check_confidence(confidence)
    if resamples < 1:
        raise RobustnessError(f"resamples={resamples}: must be at least 1; 10000 is usual.")
    if values.ndim != 1 or not len(values):
        raise RobustnessError(f"values have shape {values.shape}: a bootstrap needs at least one number in one row.")
    if not np.isfinite(values).all():
        raise RobustnessError("values contain NaN or infinity; leave such runs out and say so.")
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    # In slices, so that a long list of values does not make a huge table of draws.
    step = max(1, 2_000_000 // len(values))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        means[start : start + count] = values[generator.integers(0, len(values), (count, len(values)))].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def bootstrap_mean(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Estimate a mean with its percentile bootstrap interval (Efron 1979).

    Args:
        values: Independent observations, at least one.
        confidence: Coverage of the interval, strictly between 0 and 1.
        resamples: Number of bootstrap samples.
        seed: Seed of the resampling; the same seed gives the same interval.

    Returns:
        The mean and its bounds, in the unit of the values.

    Raises:
        RobustnessError: If there is no value, one is not finite, or another argument is out of range.
    """
    return _bootstrap(np.asarray(values, dtype=float), confidence, resamples, seed)


def bootstrap_paired_difference(
    values: Sequence[float],
    baseline: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Estimate the mean of `values - baseline` over pairs, resampling whole pairs.

    Pairs are what two methods share: the same training seed, or the same example. Resampling them together keeps what
    is common to both out of the interval.

    Args:
        values: Figures of the method, one per pair.
        baseline: Figures of the baseline, in the same order.
        confidence: Coverage of the interval, strictly between 0 and 1.
        resamples: Number of bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        The mean difference and its bounds, in the unit of the figures; positive where the method is higher.

    Raises:
        RobustnessError: If the two lists differ in length, are empty, or hold a number that is not finite.
    """
    if len(values) != len(baseline):
        raise RobustnessError(f"values has {len(values)} entries and baseline {len(baseline)}: pairs need both.")
    difference = np.asarray(values, dtype=float) - np.asarray(baseline, dtype=float)
    return _bootstrap(difference, confidence, resamples, seed)
