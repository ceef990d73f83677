"""Robust accuracy at equal clean accuracy: is a method more robust, or has it only learnt less?

Data built to fool trained models, as AdvGLUE is, favour models that have learnt less, so a method that slows learning
down looks robust. Here the clean accuracies after every epoch of every run say how far a run had come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .intervals import Interval
from .plotting import legend_below, style_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

#: Training seed -> clean and robust accuracy after each epoch, as fractions.
Course = Mapping[int, Sequence[tuple[float, float]]]
_FEWEST = 3
# Far below the square of the smallest step between two accuracies, and far above rounding.
_NO_SPREAD = 1e-12


def read_course(history: Any) -> list[tuple[float, float]]:
    """Take clean and robust accuracy after each epoch from a run's history, as examples/compare.py writes it.

    Args:
        history: `config["history"]` of a result: per epoch {"clean": {"accuracy": ...}, "robust": {"accuracy": ...}}.

    Returns:
        The pairs; empty where a run has no history, or none of robust accuracy.
    """
    pairs = []
    for epoch in history if isinstance(history, list) else []:
        parts = [epoch.get(name) for name in ("clean", "robust")] if isinstance(epoch, dict) else []
        values = [part.get("accuracy") for part in parts if isinstance(part, dict)]
        numbers = [float(value) for value in values if isinstance(value, int | float) and 0 <= value <= 1]
        if len(numbers) == 2:
            pairs.append((numbers[0], numbers[1]))
    return pairs


def difference_at_equal_clean(
    ours: Course, theirs: Course, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval | None:
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
        The difference and its bounds, as fractions; None where fewer than three epochs of either are comparable.
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
    if not np.isfinite(value):
        return None
    draws = np.random.default_rng(seed).integers(0, len(seeds), (resamples, len(seeds)))
    heights = _height(sums[draws].sum(axis=1))
    # A draw may leave one method without epochs; it says nothing.
    tail = (1 - confidence) / 2
    bounds = np.quantile(heights[np.isfinite(heights)], [tail, 1 - tail])
    return Interval(float(value), float(bounds[0]), float(bounds[1]))


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


def plot_courses(courses: Mapping[str, Course], title: str) -> Picture:
    """Draw robust against clean accuracy after each epoch, one mark per run and epoch.

    Args:
        courses: Method -> its course.
        title: Title of the picture.
    """
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

    figure = Canvas(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    shown = {}
    for number, (method, course) in enumerate(courses.items()):
        pairs = [pair for run in course.values() for pair in run]
        style = {**style_of(number), "linestyle": "", "markersize": 6, "alpha": 0.75}
        axes.plot([100 * clean for clean, _ in pairs], [100 * robust for _, robust in pairs], **style)
        shown[method] = Line2D([], [], **style)
    axes.set_xlabel("clean accuracy (%)")
    axes.set_ylabel("robust accuracy (%)")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    legend_below(figure, shown)
    return figure
