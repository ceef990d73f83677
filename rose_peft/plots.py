"""The picture of what ROSE kept: units by depth against steps."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from .errors import RoseError
from .selector import RoseSelector

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_masks(selector: RoseSelector, path: str | PathLike[str] | None = None) -> Figure:
    """Draw the masks of all units over the steps so far.

    Args:
        selector: From `get_selector(model)` or `attach_rose`.
        path: Where to save the picture; its ending decides the format. None does not save it.

    Returns:
        The matplotlib figure.

    Raises:
        RoseError: If there was no step yet.
    """
    from matplotlib.figure import Figure

    history, stride = selector.state.mask_history()
    if not len(history):
        raise RoseError("there is nothing to plot before the first optimizer step; train first.")
    names = selector.state.units
    labels = _short_names(names)
    figure = Figure(figsize=(10, max(3.0, 0.16 * len(names) + 1.6)), layout="constrained")
    axes = figure.subplots()
    steps = int(selector.state.steps)
    image = axes.imshow(
        history.T.numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap="cividis",
        vmin=0,
        vmax=1,
        extent=(0.5, steps + 0.5, len(names) - 0.5, -0.5),
    )
    axes.set_yticks(range(len(names)), labels, fontsize=7 if len(names) <= 120 else 4)
    axes.set_xlabel("optimizer step" + (f" (each column is the mean of {stride})" if stride > 1 else ""))
    axes.set_ylabel("unit, in order of depth")
    axes.set_title(f"Share of each update kept by ROSE ({selector.config.strategy.replace('_', '-')})")
    figure.colorbar(image, ax=axes, label="mask: 0 frozen, 1 fully updated", shrink=min(1.0, 30 / max(len(names), 30)))
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _short_names(names: list[str]) -> list[str]:
    """Drop the beginning that all names share, and the ending `.weight`."""
    parts = [name.removesuffix(".weight").split(".") for name in names]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return [".".join(part[shared:]) for part in parts]
