"""A measured number with its interval, and the intervals there are. Pure functions of numbers, computed by scipy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import RobustnessError


@dataclass(frozen=True)
class Estimate:
    """A measured number, in the unit of the data.

    Args:
        value: The number; None where there was nothing to measure or it was not finite.
        n: How many observations it is from, where that is known.
        low: Lower bound of its interval, if it has one.
        high: Upper bound.
    """

    value: float | None
    n: int | None = None
    low: float | None = None
    high: float | None = None

    def excludes_zero(self) -> bool:
        """Whether there is an interval and zero lies outside of it."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        if self.value is None:
            return "undefined"
        text = f"{self.value:.4g}"
        if self.low is not None and self.high is not None:
            text += f" [{self.low:.4g}, {self.high:.4g}]"
        return text + (f" (n={self.n})" if self.n is not None else "")


def wilson(successes: int, n: int, confidence: float = 0.95) -> Estimate:
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
    from scipy.stats import binomtest

    _check_confidence(confidence)
    if n < 1:
        raise RobustnessError(f"n={n}: a share needs at least one trial.")
    if not 0 <= successes <= n:
        raise RobustnessError(f"successes={successes}: must lie between 0 and n={n}.")
    share = successes / n
    low, high = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    # At the ends the bound is exactly 0 or 1 in exact arithmetic; rounding must not push it past the share.
    return Estimate(share, n, min(share, max(0.0, float(low))), max(share, min(1.0, float(high))))


def share(outcomes: Sequence[bool]) -> Estimate:
    """Estimate the share of true outcomes with its 95 % Wilson interval; undefined if there are none."""
    return wilson(sum(map(bool, outcomes)), len(outcomes)) if len(outcomes) else Estimate(None, 0)


def mean(values: Sequence[float]) -> Estimate:
    """Estimate a mean with its 95 % bootstrap interval; undefined if there are no values."""
    return bootstrap_mean(values) if len(values) else Estimate(None, 0)


def bootstrap_mean(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Estimate a mean with its percentile bootstrap interval (Efron 1979).

    Args:
        values: Independent observations, at least one; a single one has no interval.
        confidence: Coverage of the interval, strictly between 0 and 1.
        resamples: Number of bootstrap samples.
        seed: Seed of the resampling; the same seed gives the same interval.

    Returns:
        The mean and its bounds, in the unit of the values.

    Raises:
        RobustnessError: If there is no value, one is not finite, or another argument is out of range.
    """
    from scipy.stats import bootstrap

    _check_confidence(confidence)
    if resamples < 1:
        raise RobustnessError(f"resamples={resamples}: must be at least 1; 10000 is usual.")
    data = _finite(values)
    if len(data) == 1:
        return Estimate(float(data[0]), 1)
    found = bootstrap(
        (data,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, 2_000_000 // len(data)),  # a long list of values does not make a huge table of draws
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(float(data.mean()), len(data), float(found.low), float(found.high))


def bootstrap_paired_difference(
    values: Sequence[float],
    baseline: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Estimate the mean of `values - baseline` over pairs, resampling whole pairs.

    Pairs are what two methods share: the same training seed, or the same example. Resampling them together keeps what
    is common to both out of the interval. Over a handful of pairs the interval is too narrow; see `paired_difference`.

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
    return bootstrap_mean(_differences(values, baseline), confidence, resamples, seed)


def paired_difference(values: Sequence[float], baseline: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Estimate the mean of `values - baseline` over pairs with the interval of Student's t.

    It allows for a spread that is itself estimated from few pairs, as the training seeds of an experiment are.

    Args:
        values: Figures of the method, one per pair.
        baseline: Figures of the baseline, in the same order.
        confidence: Coverage of the interval, strictly between 0 and 1.

    Returns:
        The mean difference and its bounds, in the unit of the figures; a single pair has no bounds.

    Raises:
        RobustnessError: If the two lists differ in length, are empty, or hold a number that is not finite.
    """
    from scipy.stats import sem, t

    _check_confidence(confidence)
    data = np.asarray(_differences(values, baseline))
    value, n = float(data.mean()), len(data)
    if n == 1:
        return Estimate(value, 1)
    half = float(t.ppf(0.5 + confidence / 2, n - 1) * sem(data))
    return Estimate(value, n, value - half, value + half)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise RobustnessError(f"confidence={confidence}: must lie strictly between 0 and 1; 0.95 is usual.")


def _finite(values: Sequence[float]) -> np.ndarray:
    data = np.asarray(values, dtype=float)
    if data.ndim != 1 or not len(data):
        raise RobustnessError(f"values have shape {data.shape}: a mean needs at least one number in one row.")
    if not np.isfinite(data).all():
        raise RobustnessError("values contain NaN or infinity; leave such runs out and say so.")
    return data


def _differences(values: Sequence[float], baseline: Sequence[float]) -> list[float]:
    if len(values) != len(baseline):
        raise RobustnessError(f"values has {len(values)} entries and baseline {len(baseline)}: pairs need both.")
    return (_finite(values) - _finite(baseline)).tolist()
