"""The picture of what ROSE kept: units by depth against steps, from a live selector or a saved run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .errors import RoseError
from .selector import RoseSelector
from .state import FROZEN_SHARE, STATE_KEY, SelectionState

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FROZEN, PARTIAL, FULL = "#16335b", "#9a9a9a", "#f2c230"
# Files in which the Trainer and Accelerate save an optimizer.
_OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin")

Source = RoseSelector | Optimizer | Mapping[str, Any] | str | PathLike[str]


def plot_masks(source: Source, path: str | PathLike[str] | None = None) -> Figure:
    """Draw the masks of all units over the steps so far.

    Args:
        source: A selector, from `get_selector(model)` or `attach_rose`; or an optimizer that ROSE has acted on, its
            state dict, the file of one, or a checkpoint's folder with `optimizer.pt` or `optimizer.bin`.
        path: Where to save the picture; its ending decides the format. None does not save it.

    Returns:
        The matplotlib figure.

    Raises:
        RoseError: If there was no step yet, or if the source holds no state of ROSE, or that of several adapters.
    """
    from matplotlib.figure import Figure

    state = _state_of(source)
    history, stride = state.mask_history()
    if not len(history):
        raise RoseError("there is nothing to plot before the first optimizer step; train first.")
    labels = _short_names(state.units)
    # Rows that can be read, in a picture that can be opened.
    row = min(0.16, 24 / len(labels))
    figure = Figure(figsize=(12, max(4.0, row * len(labels) + 2.8)), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(1.2, max(1.5, row * len(labels))), width_ratios=(10, 0.7, 1.6))
    masks = figure.add_subplot(grid[1, 0])
    last = figure.add_subplot(grid[1, 1], sharey=masks)
    share = figure.add_subplot(grid[1, 2], sharey=masks)
    course = figure.add_subplot(grid[0, 0], sharex=masks)
    _draw_masks(masks, history, stride, int(state.steps), labels, row)
    _draw_last(last, state)
    _draw_shares(share, state)
    _draw_course(course, history, state.sizes, int(state.steps))
    _draw_legend(figure.add_subplot(grid[0, 1:]), whole_steps=stride == 1)
    statistics = state.statistics()
    figure.suptitle(
        f"ROSE, {_strategy(state)}: {statistics.kept_share:.0%} of the updates kept by units, "
        f"{statistics.kept_weight_share:.0%} by weights, in {statistics.steps} steps"
    )
    figure.supxlabel(_unmasked(source), fontsize=8)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


# Where the state comes from -----------------------------------------------------------------------------------------


def _state_of(source: Source) -> SelectionState:
    if isinstance(source, RoseSelector):
        return source.state
    if isinstance(source, (str, PathLike)):
        source = _read(os.fspath(source))
    if isinstance(source, Optimizer):
        source = {"param_groups": source.param_groups}
    homes = [group.get(STATE_KEY) or {} for group in source.get("param_groups", ())]
    found = {key: values for home in homes for key, values in home.items()}
    if len(found) != 1:
        raise RoseError(
            f"the optimizer state holds ROSE state of {len(found)} adapters ({', '.join(found) or 'none'}), and a "
            "picture shows one: pass get_selector(model) while one trains, or an optimizer that ROSE acted on."
        )
    (values,) = found.values()
    return SelectionState.saved(values)


def _read(path: str) -> Mapping[str, Any]:
    if os.path.isdir(path):
        files = [os.path.join(path, name) for name in _OPTIMIZER_FILES]
        path = next((file for file in files if os.path.exists(file)), files[0])
    return torch.load(path, map_location="cpu", weights_only=True)


def _orders(state: SelectionState) -> list[str]:
    """The orders that a state has scores of, which tell the strategy it was made with."""
    scores = {"first": state.first_scores, "second": state.second_scores}
    return [name for name, values in scores.items() if bool(values.isfinite().any())]


def _strategy(state: SelectionState) -> str:
    orders = _orders(state)
    return "ensemble" if len(orders) == 2 else f"{orders[0]} order" if orders else "no scores yet"


def _unmasked(source: Source) -> str:
    """What of the model is not in the picture."""
    said = "Not in the picture, because never masked: biases and whatever else is no unit."
    if not isinstance(source, RoseSelector):
        return said
    units = sum(unit.size() for unit in source.units)
    trained = sum(param.numel() for param in source.model.parameters() if param.requires_grad)
    return f"{said} Units are {units / trained:.0%} of the weights that train." if trained else said


# The parts of the picture -------------------------------------------------------------------------------------------


def _draw_masks(axes: Axes, history: Tensor, stride: int, steps: int, labels: list[str], row: float) -> None:
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap
    from matplotlib.ticker import MaxNLocator

    if stride == 1:
        shown = torch.where((history > 0) & (history < 1), torch.full_like(history, 0.5), history)
        colours: Any = ListedColormap([FROZEN, PARTIAL, FULL])
    else:
        shown, colours = history, LinearSegmentedColormap.from_list("masks", [FROZEN, PARTIAL, FULL])
    axes.imshow(
        shown.T.numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap=colours,
        vmin=0,
        vmax=1,
        extent=(0.5, steps + 0.5, len(labels) - 0.5, -0.5),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("optimizer step" + (f" (each column is the mean of {stride})" if stride > 1 else ""))
    layers = _layers(labels)
    for _, start, _ in layers[1:]:
        axes.axhline(start - 0.5, color="white", linewidth=1.5)
    if row >= 0.1:
        axes.set_yticks(range(len(labels)), labels, fontsize=7)
    else:  # too many to be read: the layers alone
        axes.set_yticks(
            [(start + end - 1) / 2 for _, start, end in layers], [name for name, _, _ in layers], fontsize=7
        )
    axes.set_ylabel("unit, in order of depth; a white line between layers" if len(layers) > 1 else "unit")


def _draw_last(axes: Axes, state: SelectionState) -> None:
    """The masks of both orders in the last step: which of them froze a unit."""
    from matplotlib.colors import ListedColormap

    names = _orders(state)
    axes.tick_params(left=False, labelleft=False)
    if not names:
        axes.set_axis_off()
        return
    columns = torch.stack([state.values[f"{name}_mask"] for name in names], dim=1)
    axes.imshow(
        columns.numpy(), aspect="auto", interpolation="nearest", cmap=ListedColormap([FROZEN, FULL]), vmin=0, vmax=1
    )
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_title("last step:\nby order", fontsize=8)


def _draw_shares(axes: Axes, state: SelectionState) -> None:
    shares = (state.mask_sum / state.unit_steps).nan_to_num().tolist()
    colours = [FROZEN if share < FROZEN_SHARE else FULL if share > 1 - FROZEN_SHARE else PARTIAL for share in shares]
    axes.barh(range(len(shares)), shares, color=colours, height=0.8)
    for index, share in enumerate(shares):
        if share < FROZEN_SHARE:
            axes.plot([0.03], [index], marker="x", color=FROZEN, markersize=4)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize=7)
    axes.tick_params(left=False, labelleft=False)
    axes.set_title(f"kept share\n(x: below {FROZEN_SHARE:.0%})", fontsize=8)


def _draw_course(axes: Axes, history: Tensor, sizes: Tensor, steps: int) -> None:
    """The share kept of each step, each unit counted once and by its weights."""
    weights = sizes.double()
    width = steps / len(history)
    middle = [0.5 + width * (column + 0.5) for column in range(len(history))]
    axes.plot(middle, history.double().mean(dim=1), color="#1a1a1a", linewidth=1.2, label="by units")
    by_weights = (history.double() * weights).sum(dim=1) / weights.sum()
    axes.plot(middle, by_weights, color="#b3452c", linewidth=1.2, linestyle="--", label="by weights")
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share kept", fontsize=8)
    axes.tick_params(labelbottom=False, labelsize=7)
    axes.legend(loc="lower right", fontsize=7, ncols=2)


def _draw_legend(axes: Axes, whole_steps: bool) -> None:
    from matplotlib.patches import Patch

    words = ("frozen (0)", "in part", "full (1)") if whole_steps else ("frozen in all", "in some", "full in all")
    axes.set_axis_off()
    patches = [Patch(color=colour, label=word) for colour, word in zip((FROZEN, PARTIAL, FULL), words, strict=True)]
    axes.legend(handles=patches, loc="center", fontsize=8, title="update", frameon=False)


# Names --------------------------------------------------------------------------------------------------------------


def _short_names(names: list[str]) -> list[str]:
    """Drop the beginning that all names share, and the ending `.weight`; say "layer" where a number comes first."""
    parts = [name.removesuffix(".weight").split(".") for name in names]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    short = [".".join(part[shared:]) for part in parts]
    return [re.sub(r"^(\d+)\.", r"layer \1  ", name) for name in short]


def _layers(labels: list[str]) -> list[tuple[str, int, int]]:
    """(name, first row, row after the last) of each run of units in one layer."""
    found: list[tuple[str, int, int]] = []
    for index, label in enumerate(labels):
        name = re.split(r"  |(?<=\d)\.", label, maxsplit=1)[0]
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1], index + 1)
        else:
            found.append((name, index, index + 1))
    return found
