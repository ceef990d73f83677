"""All drawing of the kit: how methods look, legends that fit below their panels, and each kind of picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RobustnessError
from .estimate import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .landscape import Surface
    from .noise import NoiseResult

Point = tuple[float, float]


_MARKERS = "osD^vP*X<>"
_LINES = ("-", "--", ":", "-.")


def style_of(number: int) -> dict[str, Any]:
    """Color, marker and line style of the method with this number; no two of the first forty look the same."""
    again = number // 10
    return {
        "color": f"C{number % 10}",
        "marker": _MARKERS[(number + again) % len(_MARKERS)],
        "linestyle": _LINES[again % len(_LINES)],
    }


def legend_below(figure: Figure, handles: Mapping[str, Any]) -> None:
    """Put one legend for all panels below them, in as many columns as fit the figure's width.

    Args:
        figure: A figure with constrained layout.
        handles: Label -> what to draw beside it.
    """
    if not handles:
        return
    # At 9 points a letter takes at most 0.08 inch; the symbol and the gaps take the rest.
    widest = 0.08 * max(map(len, handles)) + 0.7
    columns = max(1, min(4, int(figure.get_figwidth() / widest)))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=9, columnspacing=1.2
    )


def _save(figure: Figure, path: str | os.PathLike[str] | None) -> None:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


def plot_noise(results: Mapping[str, NoiseResult], path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw accuracy against the rate of noise, one panel per kind, one line per model.

    Args:
        results: Name of each model -> its result.
        path: Where to save the picture; its ending decides the format. None does not save it.

    Raises:
        RobustnessError: If there is nothing to draw.
    """
    curves = {
        name: {kind: {0.0: result.clean, **by_rate} for kind, by_rate in result.noisy.items()}
        for name, result in results.items()
    }
    return plot_curves(curves, path)


def plot_curves(
    curves: Mapping[str, Mapping[str, Mapping[float, Estimate]]], path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draw noise curves: model -> kind -> rate -> accuracy, with a band where a figure has bounds.

    Raises:
        RobustnessError: If there is nothing to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    kinds = list(dict.fromkeys(kind for by_kind in curves.values() for kind in by_kind))
    if not kinds:
        raise RobustnessError("curves are empty: there is no noise result to plot.")
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(max(6.5, 3.1 * columns), 2.7 * rows + 1.3), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for axes, kind in zip(panels, kinds, strict=False):
        for number, (name, by_kind) in enumerate(curves.items()):
            points = sorted((r, f) for r, f in by_kind.get(kind, {}).items() if f.value is not None)
            if not points:
                continue
            rates = [rate for rate, _ in points]
            style = style_of(number)
            axes.plot(rates, [f.value for _, f in points], markersize=3, label=name, **style)
            low = [f.value if f.low is None else f.low for _, f in points]
            high = [f.value if f.high is None else f.high for _, f in points]
            axes.fill_between(rates, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axes.set_title(kind, fontsize=10)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.xaxis.set_tick_params(labelbottom=True)
        axes.set_xlabel("share of words hit", fontsize=9)
    for axes in list(figure.axes)[len(kinds) :]:
        axes.set_visible(False)
    figure.suptitle("Accuracy under noise")
    figure.supylabel("accuracy", fontsize=10)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    legend_below(figure, handles)
    _save(figure, path)
    return figure


def plot_surfaces(
    surfaces: Mapping[str, Surface],
    path: str | os.PathLike[str] | None = None,
    title: str = "Loss landscape",
    ceiling: float | None = None,
) -> Figure:
    """Draw the surfaces of several models: planes side by side on one colour scale, lines in one diagram.

    Args:
        surfaces: Name of each model -> its surface, all lines or all planes.
        path: Where to save the picture; its ending decides the format. None does not save it.
        title: Title above all panels.
        ceiling: Highest loss that is told apart, so that one steep model does not flatten all others; None for the
            highest there is.

    Raises:
        RobustnessError: If there is nothing to draw, or lines and planes are mixed.
    """
    from matplotlib.figure import Figure

    if not surfaces:
        raise RobustnessError("surfaces is empty: there is nothing to plot.")
    if len({surface.dimensions for surface in surfaces.values()}) > 1:
        raise RobustnessError("surfaces mix lines and planes; plot them apart.")
    if next(iter(surfaces.values())).dimensions == 1:
        figure = Figure(figsize=(6.5, 5.0), layout="constrained")
        axes = figure.subplots()
        for name, surface in surfaces.items():
            axes.plot(surface.steps, surface.losses, marker="o", markersize=2.5, label=name)
        if ceiling is not None:
            axes.set_ylim(top=ceiling)
        axes.set_xlabel("step along direction 1")
        axes.set_ylabel("mean cross-entropy loss (nats)")
        axes.grid(alpha=0.3)
        legend_below(figure, {str(line.get_label()): line for line in axes.lines})
    else:
        figure = _plot_planes(surfaces, ceiling)
    figure.suptitle(
        f"{title}\nrandom directions, filter-normalised\n(a step of 1 moves every filter by its own length)",
        fontsize=10,
    )
    _save(figure, path)
    return figure


def _plot_planes(surfaces: Mapping[str, Surface], ceiling: float | None) -> Figure:
    """Draw planes as relief above and as contours below, all panels on the same scale."""
    import numpy as np
    from matplotlib.figure import Figure

    count = len(surfaces)
    grids = {name: np.asarray(surface.losses, dtype=float) for name, surface in surfaces.items()}
    finite = np.concatenate([grid[np.isfinite(grid)] for grid in grids.values()])
    if not len(finite):
        raise RobustnessError("surfaces hold no finite loss; choose a smaller radius.")
    low, high = float(finite.min()), float(finite.max())
    if ceiling is not None:
        high = min(high, ceiling)
    if high <= low:
        high = low + 1e-6
    levels = np.linspace(low, high, 25)
    figure = Figure(figsize=(3.1 * count + 1.2, 6.4), layout="constrained")
    shared: dict[str, Any] = {"cmap": "viridis", "vmin": low, "vmax": high}
    contours: Any = None
    flat = []
    for column, (name, surface) in enumerate(surfaces.items()):
        grid = np.nan_to_num(grids[name], nan=high, posinf=high).clip(max=high)
        across, along = np.meshgrid(surface.steps, surface.steps)
        relief = figure.add_subplot(2, count, column + 1, projection="3d")
        relief.plot_surface(across, along, grid, rstride=1, cstride=1, linewidth=0, antialiased=True, **shared)
        relief.set_zlim(low, high)
        relief.set_zlabel("loss", fontsize=8, labelpad=0)
        relief.set_title(f"{name}\nloss at the weights {surface.centre:.3f}", fontsize=10)
        relief.tick_params(labelsize=7, pad=-2)
        plane = figure.add_subplot(2, count, count + column + 1)
        contours = plane.contourf(across, along, grid, levels=levels, **shared)
        plane.contour(across, along, grid, levels=levels[::3], colors="white", linewidths=0.4)
        plane.plot(0, 0, marker="+", color="red", markersize=8, linestyle="", label="the model")
        plane.set_aspect("equal")
        plane.tick_params(labelsize=8)
        plane.set_xlabel("step along direction 1", fontsize=9)
        if column == 0:
            plane.set_ylabel("step along direction 2", fontsize=9)
            plane.legend(loc="upper left", fontsize=7, framealpha=0.8)
        flat.append(plane)
    label = "mean cross-entropy loss (nats)" + (f"\n{high:g} and above look alike" if ceiling is not None else "")
    bar = figure.colorbar(contours, ax=flat, label=label, shrink=0.9, aspect=15, format="%.2f")
    bar.ax.tick_params(labelsize=8)
    return figure


def plot_scatter(panels: Mapping[str, Mapping[str, Sequence[Point]]], title: str) -> Figure:
    """Draw clean against robust accuracy: small points for runs, large ones for their means; up and right is better.

    Args:
        panels: Title of each panel -> method -> clean and robust accuracy of each run, as fractions.
        title: Title above all panels.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    methods = list(dict.fromkeys(method for points in panels.values() for method in points))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(5.5, 3.6 * columns), 3.2 * rows + 1.4), layout="constrained")
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    shown: dict[str, Line2D] = {}
    for axes, (panel, by_method) in zip(all_axes, panels.items(), strict=False):
        for method, points in by_method.items():
            style = {**style_of(methods.index(method)), "linestyle": ""}
            across, along = 100 * np.array(points).T
            axes.plot(across, along, markersize=4, alpha=0.45, **style)
            large: dict[str, Any] = {"markersize": 9, "markeredgecolor": "black", **style}
            axes.plot([across.mean()], [along.mean()], zorder=3, **large)
            shown[method] = Line2D([], [], **large)
        axes.set_title(panel, fontsize=10)
        axes.set_xlabel("clean accuracy (%)", fontsize=9)
        axes.set_ylabel("robust accuracy (%)", fontsize=9)
        axes.grid(alpha=0.3)
        axes.margins(0.15)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(f"{title}\nlarge: mean over seeds, small: one seed", fontsize=11)
    legend_below(figure, shown)
    return figure


def plot_courses(courses: Mapping[str, Mapping[int, Sequence[Point]]], title: str) -> Figure:
    """Draw robust against clean accuracy after each epoch, one mark per run and epoch.

    Args:
        courses: Method -> training seed -> clean and robust accuracy after each epoch, as fractions.
        title: Title of the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(8, 6), layout="constrained")
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


def plot_cost(
    panels: Mapping[str, Mapping[str, tuple[float, Estimate]]], path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draw what risk passes choose against what they cost, one panel each; up and left is better.

    Args:
        panels: Title of each panel -> way to score -> its cost, relative to a step without risk pass, and the
            agreement of its masks with the expected ones, as a fraction.
        path: Where to save the picture; its ending decides the format. None does not save it.

    Raises:
        RobustnessError: If there is nothing to draw.
    """
    from matplotlib.figure import Figure

    if not panels:
        raise RobustnessError("panels are empty: there is no cost to plot.")
    figure = Figure(figsize=(4.2 * len(panels) + 0.5, 5.2), layout="constrained")
    all_axes = list(figure.subplots(1, len(panels), squeeze=False).flat)
    shown: dict[str, Any] = {}
    for axes, (title, points) in zip(all_axes, panels.items(), strict=True):
        for number, (way, (cost, agreement)) in enumerate(points.items()):
            if agreement.value is None:
                continue
            style = {**style_of(number), "linestyle": "", "markersize": 7}
            bounds = [agreement.low, agreement.high]
            low, high = (agreement.value if bound is None else bound for bound in bounds)
            errors = [[agreement.value - low], [high - agreement.value]]
            shown[way] = axes.errorbar([cost], [agreement.value], errors, capsize=3, elinewidth=0.8, **style)
        axes.set_xscale("log")
        ticks = [1, 1.1, 1.25, 1.5, 2, 3]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("time of a step x one without risk pass", fontsize=9)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("units whose mask is the expected one", fontsize=9)
    figure.suptitle("What a risk pass costs and how well it chooses")
    legend_below(figure, shown)
    _save(figure, path)
    return figure


def plot_pairs(
    panels: Mapping[str, Mapping[str, Sequence[float]]], title: str, path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draw the shares that runs of several methods have, one panel per measure, with a line for each seed.

    Args:
        panels: Title of each panel -> method -> share of each run as a fraction, in the same order of seeds.
        title: Title above all panels.
        path: Where to save the picture; its ending decides the format. None does not save it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(panels) + 0.4, 3.6), layout="constrained")
    for axes, (panel, by_method) in zip(
        figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True
    ):
        for seed in zip(*by_method.values(), strict=True):
            axes.plot(range(len(seed)), [100 * value for value in seed], color="grey", alpha=0.6, linewidth=1)
        for number, values in enumerate(by_method.values()):
            style = {**style_of(number), "linestyle": ""}
            axes.plot([number] * len(values), [100 * value for value in values], markersize=4, alpha=0.6, **style)
            mean = 100 * sum(values) / len(values)
            axes.plot([number], [mean], markersize=9, markeredgecolor="black", zorder=3, **style)
        axes.set_xticks(range(len(by_method)), list(by_method))
        axes.set_title(panel, fontsize=8)
        axes.margins(x=0.4, y=0.2)
        low, high = axes.get_ylim()
        spare = max(0.0, 4 - (high - low)) / 2  # a panel without spread is no panel of thousandths
        axes.set_ylim(max(-1, low - spare), min(101, high + spare))
        axes.grid(alpha=0.3)
    figure.supylabel("per cent", fontsize=9)
    figure.suptitle(f"{title}; large: their mean", fontsize=10)
    _save(figure, path)
    return figure
