"""The pictures of the report: which numbers go into which drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..estimate import Estimate
from ..plotting import Point, plot_courses, plot_curves, plot_scatter
from .equal_clean import Course
from .frame import Column, by_seed, columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

CLEAN = Column("clean_accuracy", "", 0.0)
_ROBUST = ("robust_accuracy", "noise_mean_accuracy", "accuracy_under_attack")


def draw(
    frame: DataFrame, methods: Sequence[str], courses: Mapping[str, Mapping[str, Course]], task: str
) -> dict[str, tuple[str, Figure]]:
    """Draw what the lines of one task allow: short name -> caption and picture."""
    drawn = {
        "scatter": ("Clean against robust accuracy", scatter(frame, methods, task)),
        "noise": ("Accuracy under noise", noise(frame, methods, task)),
    }
    for name, by_method in courses.items():
        caption = f"Clean and {name} accuracy after each epoch of each run"
        drawn[f"course {name}"] = caption, plot_courses(by_method, f"{caption}, {task}")
    return {name: (caption, picture) for name, (caption, picture) in drawn.items() if picture is not None}


def scatter(frame: DataFrame, methods: Sequence[str], task: str) -> Figure | None:
    """Draw clean against robust accuracy, one panel per kind of robustness; None without both."""
    from pandas import concat

    clean = by_seed(frame, CLEAN)
    panels: dict[str, dict[str, list[Point]]] = {}
    for column in columns(frame, "main"):
        if column.measure not in _ROBUST:
            continue
        robust = by_seed(frame, column)
        for method in (name for name in methods if name in clean and name in robust):
            both = concat([clean[method], robust[method]], axis=1).dropna()
            if len(both):
                points = [(float(x), float(y)) for x, y in both.to_numpy()]
                panels.setdefault(column.title(""), {})[method] = points
    return plot_scatter(panels, f"Clean against robust accuracy, {task}") if panels else None


def noise(frame: DataFrame, methods: Sequence[str], task: str) -> Figure | None:
    """Draw the noise curves, mean over seeds, with a band from the lowest to the highest seed; None without noise."""
    curves: dict[str, dict[str, dict[float, Estimate]]] = {}
    for column in columns(frame, ""):
        if column.measure != "noise_accuracy":
            continue
        for rate, table in ((0.0, by_seed(frame, CLEAN)), (column.rate, by_seed(frame, column))):
            for method in (name for name in methods if name in table):
                values = table[method].dropna()
                if len(values):
                    band = Estimate(values.mean(), len(values), values.min(), values.max())
                    curves.setdefault(method, {}).setdefault(column.part, {})[rate] = band
    noisy = {
        method: kinds for method, kinds in curves.items() if any(set(points) - {0.0} for points in kinds.values())
    }
    if not noisy:
        return None
    figure = plot_curves(noisy)
    figure.suptitle(f"Accuracy under noise, {task} (mean over seeds; band: lowest to highest seed)", fontsize=11)
    return figure
