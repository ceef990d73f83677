"""Intervals against published tables, the equations that define them, and their coverage."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rose_peft.robustness.errors import RobustnessError
from rose_peft.robustness.estimate import (
    Estimate,
    bootstrap_mean,
    bootstrap_paired_difference,
    mean,
    paired_difference,
    share,
    wilson,
)


def parts(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high


# Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_agrees_with_the_published_table(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson(successes, n)
    assert (interval.value, interval.n) == (successes / n, n)
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int]:
    n = draw(st.integers(1, 5000))
    return draw(st.integers(0, n)), n


@given(counts(), st.floats(0.5, 0.999))
def test_wilson_bounds_solve_the_score_equation(count: tuple[int, int], confidence: float) -> None:
    successes, n = count
    share, low, high = parts(wilson(successes, n, confidence))
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        assert math.isclose(abs(share - bound), z * math.sqrt(bound * (1 - bound) / n), abs_tol=1e-6)
    mirrored = wilson(n - successes, n, confidence)
    assert math.isclose(low, 1 - mirrored.high, abs_tol=1e-12)
    assert math.isclose(high, 1 - mirrored.low, abs_tol=1e-12)


@pytest.mark.parametrize(("successes", "n", "confidence"), [(0, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)])
def test_wilson_refuses_what_is_no_share(successes: int, n: int, confidence: float) -> None:
    with pytest.raises(RobustnessError, match=r"n=|successes=|confidence="):
        wilson(successes, n, confidence)


def test_bootstrap_mean_is_the_normal_interval_for_many_values() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    estimate = bootstrap_mean(list(values))
    mean, low, high = parts(estimate)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)
    assert bootstrap_mean(list(values)) == estimate != bootstrap_mean(list(values), seed=1)


def test_paired_difference_resamples_pairs_together() -> None:
    generator = np.random.default_rng(0)
    common = generator.normal(0, 10, 30)
    baseline, values = list(common), list(common + 1 + generator.normal(0, 0.1, 30))
    difference, low, high = parts(bootstrap_paired_difference(values, baseline))
    assert difference == pytest.approx(1, abs=0.1)
    # Resampled apart, the spread of what both share would make it some ten points wide.
    assert high - low < 0.2
    assert low < 1.05 and high > 0.95
    swapped = bootstrap_paired_difference(baseline, values)
    assert parts(swapped) == pytest.approx((-difference, -high, -low), abs=1e-9)


def test_bootstrap_refuses_what_it_cannot_resample() -> None:
    with pytest.raises(RobustnessError, match="pairs need both"):
        bootstrap_paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(RobustnessError, match="at least one number"):
        bootstrap_mean([])
    with pytest.raises(RobustnessError, match="NaN"):
        bootstrap_mean([1.0, float("nan")])


def test_a_paired_difference_agrees_with_student() -> None:
    """ "Student" 1908: additional hours of sleep of ten patients with two drugs; mean 1.58, interval 0.70 to 2.46."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    estimate = paired_difference(second, first)
    assert (estimate.n, round(estimate.value, 2)) == (10, 1.58)
    assert (round(estimate.low, 4), round(estimate.high, 4)) == (0.7001, 2.4599)
    assert estimate.excludes_zero() and not paired_difference([1.0, -1.0], [0.0, 0.0]).excludes_zero()


def test_what_all_pairs_agree_on_has_no_spread_and_one_pair_no_interval() -> None:
    assert parts(paired_difference([1.0, 2.0, 3.0], [0.5, 1.5, 2.5])) == (0.5, 0.5, 0.5)
    assert paired_difference([1.0], [0.5]) == Estimate(0.5, 1) == bootstrap_paired_difference([1.0], [0.5])
    assert not Estimate(0.5, 1).excludes_zero()
    with pytest.raises(RobustnessError, match="pairs need both"):
        paired_difference([1.0, 2.0], [1.0])


def test_estimates_carry_their_intervals() -> None:
    assert share([True] * 81 + [False] * 182).low == pytest.approx(0.2553, abs=1e-4)
    assert mean([1.0, 2.0, 3.0]).value == 2.0
    assert mean([]) == share([]) == Estimate(None, 0)
    assert str(Estimate(0.5, 4, 0.15, 0.85)) == "0.5 [0.15, 0.85] (n=4)"
