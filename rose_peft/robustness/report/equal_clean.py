"""Robust accuracy at equal clean accuracy: is a method more robust, or has it only learnt less?

Data built to fool trained models, as AdvGLUE is, favour models that have learnt less, so a method that slows learning
down looks robust. Here the clean accuracies after every epoch of every run say how far a run had come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..estimate import Estimate
from ..plotting import Point
from ..results import Result

#: Training seed -> clean and robust accuracy after each epoch, as fractions.
Course = Mapping[int, Sequence[Point]]
_FEWEST = 3
# Far below the square of the smallest step between two accuracies, and far above rounding.
_NO_SPREAD = 1e-12


def gather_courses(results: Sequence[Result], methods: Sequence[str]) -> dict[str, dict[str, dict[int, list[Point]]]]:
    """Gather clean and robust accuracy after each epoch from the histories that the benchmark writes.

    Args:
        results: Results whose `config["history"]` has per epoch {"clean": {"accuracy": ...},
            "robust": {name of the robust set: {"accuracy": ...}}}; others are passed over.
        methods: The methods, in the order wanted.

    Returns:
        Robust set -> method -> training seed -> the pairs.
    """
    found: dict[str, dict[str, dict[int, list[Point]]]] = {}
    for method in methods:
        for result in (result for result in results if result.method == method):
            for epoch in result.config.get("history", []):
                for name, robust in epoch.get("robust", {}).items():
                    course = found.setdefault(name, {}).setdefault(method, {}).setdefault(result.seed, [])
                    course.append((epoch["clean"]["accuracy"], robust["accuracy"]))
    return found


def difference_at_equal_clean(
    ours: Course, theirs: Course, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Estimate | None:
    """Estimate how much more robust a method is than the baseline where both have the same clean accuracy.

    Both get a line of robust over clean accuracy with one common slope (analysis of covariance); the estimate is the
    height of one line above the other. Only epochs within the clean accuracies that both have are used, and only seeds
    that both have; the bootstrap resamples whole seeds, since epochs of one run are not independent.

    Args:
        ours: Course of the method.
        theirs: Course of the baseline.
        confidence: Coverage of the interval, strictly between 0 and 1.
        resamples: Number of bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        The difference, the number of seeds of which both have a comparable epoch, and the bounds where these are two
        at least, as fractions; None where there is no such seed, or fewer than three epochs of either are comparable.
    """
    seeds = sorted(set(ours) & set(theirs))
    both = [[pair for one in seeds for pair in course[one]] for course in (ours, theirs)]
    if not all(both):
        return None
    low = max(min(clean for clean, _ in pairs) for pairs in both)
    high = min(max(clean for clean, _ in pairs) for pairs in both)
    # Sums per seed and method, from which the lines of any choice of seeds follow.
    sums = np.zeros((len(seeds), 2, 5))
    for row, one in enumerate(seeds):
        for column, course in enumerate((ours, theirs)):
            for clean, robust in course[one]:
                if low <= clean <= high:
                    sums[row, column] += (1, clean, robust, clean * clean, clean * robust)
    if (sums[:, :, 0].sum(axis=0) < _FEWEST).any():
        return None
    value = _height(sums.sum(axis=0))
    shared = int((sums[:, :, 0] > 0).all(axis=1).sum())
    if not np.isfinite(value) or not shared:
        return None
    if shared == 1:
        return Estimate(float(value), 1)
    draws = np.random.default_rng(seed).integers(0, len(seeds), (resamples, len(seeds)))
    heights = _height(sums[draws].sum(axis=1))
    # A draw may leave one method without epochs; it says nothing.
    tail = (1 - confidence) / 2
    bounds = np.quantile(heights[np.isfinite(heights)], [tail, 1 - tail])
    return Estimate(float(value), shared, float(bounds[0]), float(bounds[1]))


def _height(sums: np.ndarray) -> np.ndarray:
    """Height of the first method's line above the second's, from sums of shape (..., 2, 5)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        count, clean, robust, squares, products = np.moveaxis(sums, -1, 0)
        mean_clean, mean_robust = clean / count, robust / count
        spread = (squares - count * mean_clean**2).sum(axis=-1)
        spread = np.where(spread > _NO_SPREAD, spread, np.nan)
        slope = (products - count * mean_clean * mean_robust).sum(axis=-1) / spread
        gap = mean_clean[..., 0] - mean_clean[..., 1]
        # Without any spread there is no slope, and none is needed where the means agree.
        correction = np.where(gap == 0, 0.0, slope * gap)
        return np.asarray(mean_robust[..., 0] - mean_robust[..., 1] - correction)
