"""What all plots share: how methods look, and legends that fit below their panels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
