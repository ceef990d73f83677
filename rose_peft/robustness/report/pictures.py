"""The pictures of the report: which numbers go into which drawing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..estimate import Estimate, paired_difference
from ..plotting import Cloud, Styles, plot_courses, plot_curves, plot_scatter
from .equal_clean import Course
from .frame import Column, by_seed, columns, select

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame, Index

CLEAN = Column("clean_accuracy", "", 0.0)
_ROBUST = ("robust_accuracy", "noise_mean_accuracy", "accuracy_under_attack")
MOST = 6  # more methods than these cannot be told apart in one picture


def draw(
    frame: DataFrame, styles: Styles, courses: Mapping[str, Mapping[str, Course]], task: str
) -> dict[str, tuple[str, Figure]]:
    """Draw what the lines of one task allow, of the methods that have a style: short name -> caption and picture."""
    drawn = {
        "scatter": ("Clean against robust accuracy", scatter(frame, styles, task)),
        "noise": ("Accuracy under noise", noise(frame, styles, task)),
    }
    for name, by_method in courses.items():
        shown = {method: by_method[method] for method in styles if method in by_method}
        caption = f"Clean and {name} accuracy after each epoch of each run"
        drawn[f"course {name}"] = caption, plot_courses(shown, styles, f"{caption}, {task}") if shown else None
    return {name: (caption, picture) for name, (caption, picture) in drawn.items() if picture is not None}


def scatter(frame: DataFrame, styles: Styles, task: str) -> Figure | None:
    """Draw clean against robust accuracy, one panel per kind of robustness; None without both."""
    from pandas import concat

    clean = by_seed(frame, CLEAN)
    panels: dict[str, dict[str, Cloud]] = {}
    for column in columns(frame, "main"):
        if column.measure not in _ROBUST:
            continue
        robust = by_seed(frame, column)
        for method in (name for name in styles if name in clean and name in robust):
            both = concat([clean[method], robust[method]], axis=1).dropna()
            if len(both):
                points = [(float(x), float(y)) for x, y in both.to_numpy()]
                means = [_mean(frame, method, axis, both.index) for axis in (CLEAN, column)]
                panels.setdefault(column.title(""), {})[method] = Cloud(points, *means)
    return plot_scatter(panels, styles, f"Clean against robust accuracy, {task}") if panels else None


def _mean(frame: DataFrame, method: str, column: Column, seeds: Index) -> Estimate:
    """Mean over seeds with the interval of Student's t; of one seed, the number with its interval within the run."""
    rows = select(frame, column)
    rows = rows[(rows["method"] == method) & rows["seed"].isin(seeds)]
    if len(rows) > 1:
        return paired_difference(rows["value"].tolist(), [0.0] * len(rows))
    value, low, high = rows[["value", "low", "high"]].iloc[0]
    return Estimate(value, 1, low, high) if low == low and high == high else Estimate(value, 1)


def noise(frame: DataFrame, styles: Styles, task: str) -> Figure | None:
    """Draw the noise curves, mean over seeds, with a band from the lowest to the highest seed; None without noise."""
    curves: dict[str, dict[str, dict[float, Estimate]]] = {}
    for column in columns(frame, ""):
        if column.measure != "noise_accuracy":
            continue
        for rate, table in ((0.0, by_seed(frame, CLEAN)), (column.rate, by_seed(frame, column))):
            for method in (name for name in styles if name in table):
                values = table[method].dropna()
                if len(values):
                    band = Estimate(values.mean(), len(values), values.min(), values.max())
                    curves.setdefault(method, {}).setdefault(column.part, {})[rate] = band
    noisy = {
        method: kinds for method, kinds in curves.items() if any(set(points) - {0.0} for points in kinds.values())
    }
    if not noisy:
        return None
    return plot_curves(noisy, styles, "lowest to highest seed", f"Accuracy under noise, {task} (mean over seeds)")
