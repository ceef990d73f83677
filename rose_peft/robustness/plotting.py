"""All drawing of the kit: how methods look, legends that fit below their panels, and each kind of picture."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RobustnessError
from .estimate import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .landscape import Surface
    from .noise import NoiseResult

Point = tuple[float, float]
Styles = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Cloud:
    """Clean and robust accuracy of a method's runs, and the means with their intervals; all are fractions."""

    points: Sequence[Point]
    clean: Estimate
    robust: Estimate


# The baseline is black; the first six are told apart by readers who see no red or no green, too.
_COLORS = (
    "#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e6b800", "#56b4e9", "#8c564b", "#999999", "#5e3c99"
)  # fmt: skip
# A filled plus comes late: with its white edge it looks like the cross of its intervals.
_MARKERS = "osD^v<>P*X"
_LINES = ("-", "--", ":", "-.")


def style_of(number: int) -> dict[str, Any]:
    """Color, marker and line style of the method with this number; no two of the first forty look the same."""
    again = number // 10
    return {
        "color": _COLORS[number % 10],
        "marker": _MARKERS[(number + again) % len(_MARKERS)],
        "linestyle": _LINES[again % len(_LINES)],
    }


def styles_of(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Give each name a look of its own, for all pictures that get the same mapping."""
    return {name: style_of(number) for number, name in enumerate(names)}


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
    figure = plot_curves(curves, styles_of(curves), "95 % interval over texts (Wilson)")
    _save(figure, path)
    return figure


def plot_curves(
    curves: Mapping[str, Mapping[str, Mapping[float, Estimate]]],
    styles: Styles,
    band: str,
    title: str = "Accuracy under noise",
) -> Figure:
    """Draw noise curves with a band where a figure has bounds.

    Args:
        curves: Model -> kind -> rate -> accuracy, as fractions.
        styles: How each model looks.
        band: What the bands are, for the legend.
        title: Title above all panels.

    Raises:
        RobustnessError: If there is nothing to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    kinds = list(dict.fromkeys(kind for by_kind in curves.values() for kind in by_kind))
    if not kinds:
        raise RobustnessError("curves are empty: there is no noise result to plot.")
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(max(6.5, 3.1 * columns), 2.7 * rows + 1.3), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    banded = False
    for position, (axes, kind) in enumerate(zip(panels, kinds, strict=False)):
        for name, by_kind in curves.items():
            points = sorted((r, f) for r, f in by_kind.get(kind, {}).items() if f.value is not None)
            if not points:
                continue
            rates = [rate for rate, _ in points]
            style = styles[name]
            axes.plot(rates, [f.value for _, f in points], markersize=4, label=name, **style)
            low = [f.value if f.low is None else f.low for _, f in points]
            high = [f.value if f.high is None else f.high for _, f in points]
            axes.fill_between(rates, low, high, color=style["color"], alpha=0.12, linewidth=0)
            banded = banded or low != high
        axes.set_title(kind, fontsize=10)
        axes.grid(alpha=0.3)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(_percent_tick)
        axes.xaxis.set_tick_params(labelbottom=True)
        axes.set_xlabel("share of words hit", fontsize=9)
        if position % columns == 0:
            axes.set_ylabel("accuracy", fontsize=9)
    for axes in list(figure.axes)[len(kinds) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=11)
    handles: dict[str, Any] = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if banded:
        handles[f"band: {band}"] = Patch(color="grey", alpha=0.3, linewidth=0)
    legend_below(figure, handles)
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
        styles = styles_of(surfaces)
        for name, surface in surfaces.items():
            axes.plot(surface.steps, surface.losses, markersize=3, label=name, **styles[name])
        _plain_numbers(axes.yaxis, 7)
        if ceiling is not None:
            axes.set_ylim(top=ceiling)
        axes.set_xlabel("step along direction 1")
        axes.set_ylabel("mean cross-entropy loss (nats)")
        axes.grid(alpha=0.3)
        legend_below(figure, {str(line.get_label()): line for line in axes.lines})
    else:
        figure = _plot_planes(surfaces, ceiling)
    figure.suptitle(
        f"{title}\nrandom directions, filter-normalised (a step of 1 moves every filter by its own length)\n"
        f"{_sample(surfaces.values())}",
        fontsize=10,
    )
    _save(figure, path)
    return figure


def _sample(surfaces: Iterable[Surface]) -> str:
    """Say over how many examples and with which seed surfaces were measured; each once where they agree."""
    known = list(surfaces)
    sizes = list(dict.fromkeys("unknown" if surface.n is None else str(surface.n) for surface in known))
    seeds = list(dict.fromkeys(str(surface.seed) for surface in known))
    return f"n = {', '.join(sizes)} examples; seed of the directions {', '.join(seeds)}"


def _percent_tick(fraction: float, _: int) -> str:
    """Label a tick with as many digits as it needs: 10 %, 2.5 %."""
    return f"{round(100 * fraction, 6):g} %"


def _plain_numbers(axis: Any, most: int) -> None:
    """Label an axis with as many digits as its ticks need to differ, and without an offset to add in one's head."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    formatter = ScalarFormatter(useOffset=False)
    formatter.set_scientific(False)
    axis.set_major_locator(MaxNLocator(most))
    axis.set_major_formatter(formatter)


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
        relief.set_zlabel("loss", fontsize=8, labelpad=6)
        # Labels at the ends of both directions would meet in the corner.
        inner = [surface.steps[0] / 2, 0.0, surface.steps[-1] / 2]
        relief.set_xticks(inner)
        relief.set_yticks(inner)
        _plain_numbers(relief.zaxis, 5)
        relief.set_title(f"{name}\nloss at the weights {surface.centre:.3f}", fontsize=10)
        relief.tick_params(labelsize=7, pad=-2)
        relief.tick_params(axis="z", pad=2)
        plane = figure.add_subplot(2, count, count + column + 1)
        contours = plane.contourf(across, along, grid, levels=levels, **shared)
        plane.contour(across, along, grid, levels=levels[::3], colors="white", linewidths=0.4)
        plane.plot(0, 0, marker="+", color="red", markersize=8, linestyle="", label="the model")
        plane.set_aspect("equal")
        plane.tick_params(labelsize=8)
        plane.set_xticks([surface.steps[0], *inner, surface.steps[-1]])
        plane.set_yticks([surface.steps[0], *inner, surface.steps[-1]])
        plane.set_xlabel("step along direction 1", fontsize=9)
        if column == 0:
            plane.set_ylabel("step along direction 2", fontsize=9)
            plane.legend(loc="upper left", fontsize=7, framealpha=0.8)
        flat.append(plane)
    label = "mean cross-entropy loss (nats)" + (f"\n{high:g} and above look alike" if ceiling is not None else "")
    bar = figure.colorbar(contours, ax=flat, label=label, shrink=0.9, aspect=15)
    _plain_numbers(bar.ax.yaxis, 7)
    bar.ax.tick_params(labelsize=8)
    return figure


def plot_scatter(panels: Mapping[str, Mapping[str, Cloud]], styles: Styles, title: str) -> Figure:
    """Draw clean against robust accuracy: small points for runs, large ones with intervals for their means.

    Args:
        panels: Title of each panel -> method -> its runs and means; up and right is better.
        styles: How each method looks.
        title: Title above all panels.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(2 if len(panels) == 4 else 3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(5.5, 4.2 * columns), 3.4 * rows + 1.4), layout="constrained")
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    shown: dict[str, Line2D] = {}
    for axes, (panel, by_method) in zip(all_axes, panels.items(), strict=False):
        for method, cloud in by_method.items():
            style = {**styles[method], "linestyle": ""}
            across, along = 100 * np.array(cloud.points).T
            axes.plot(across, along, markersize=4, alpha=0.35, **style)
            large: dict[str, Any] = {"markersize": 9, "markeredgecolor": "white", **style}
            axes.errorbar(
                [100 * (cloud.clean.value or 0.0)],
                [100 * (cloud.robust.value or 0.0)],
                xerr=_arms(cloud.clean),
                yerr=_arms(cloud.robust),
                elinewidth=1,
                zorder=3,
                **large,
            )
            shown[method] = Line2D([], [], **large)
        axes.set_title(panel, fontsize=10)
        axes.set_xlabel("clean accuracy (%)", fontsize=9)
        axes.set_ylabel("robust accuracy (%)", fontsize=9)
        axes.grid(alpha=0.3)
        axes.margins(0.1)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(
        f"{title}\nlarge: mean over seeds with its 95 % interval (Student's t; of one seed that within the run), "
        "small: one seed",
        fontsize=10,
    )
    legend_below(figure, shown)
    return figure


def _arms(estimate: Estimate) -> list[list[float]] | None:
    """Lengths of an interval below and above its value, in per cent."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return None
    return [[100 * max(0.0, estimate.value - estimate.low)], [100 * max(0.0, estimate.high - estimate.value)]]


def plot_courses(courses: Mapping[str, Mapping[int, Sequence[Point]]], styles: Styles, title: str) -> Figure:
    """Draw how robust and clean accuracy of each run go through the epochs, one panel per method.

    All panels have the same axes; the runs of the first method lie in grey behind the others.

    Args:
        courses: Method -> training seed -> clean and robust accuracy after each epoch, as fractions.
        styles: How each method looks.
        title: Title of the picture.
    """
    from matplotlib.figure import Figure

    columns = min(3, len(courses))
    rows = -(-len(courses) // columns)
    figure = Figure(figsize=(max(5.5, 3.4 * columns), 2.9 * rows + 0.8), layout="constrained")
    all_axes = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    first = next(iter(courses))
    for axes, (method, course) in zip(all_axes, courses.items(), strict=False):
        if method != first:
            for run in courses[first].values():
                axes.plot(*_percent(run), color="grey", alpha=0.35, linewidth=1, label="_behind")
        for run in course.values():
            style = styles[method]
            axes.plot(*_percent(run), markersize=3, linewidth=1.2, alpha=0.8, **style, label=method)
            ends: dict[str, Any] = {**style, "linestyle": "", "markersize": 8, "markeredgecolor": "white"}
            axes.plot(*_percent(run[-1:]), **ends, zorder=3, label="_last")
        axes.set_title(method, fontsize=10, color=styles[method]["color"])
        axes.grid(alpha=0.3)
        axes.xaxis.set_tick_params(labelbottom=True)
        axes.set_xlabel("clean accuracy (%)", fontsize=9)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("robust accuracy (%)", fontsize=9)
    for axes in all_axes[len(courses) :]:
        axes.set_visible(False)
    grey = f"; grey: {first}" if len(courses) > 1 else ""
    figure.suptitle(f"{title}\nline: one run through its epochs, large: its last epoch{grey}", fontsize=10)
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


def _percent(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [100 * clean for clean, _ in points], [100 * robust for _, robust in points]


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
