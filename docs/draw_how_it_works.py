"""Draws docs/how-it-works.svg: `python docs/draw_how_it_works.py`. Plain SVG, no library."""

from __future__ import annotations

from pathlib import Path

FROZEN, PART, FULL, INK, LINE = "#16335b", "#9a9a9a", "#f2c230", "#1a1a1a", "#555555"
# A score for each of eight units; with upper quantile 0.7 the five smallest are kept.
FIRST = [0.30, 0.22, 0.95, 0.40, 0.80, 0.15, 0.90, 0.35]
SECOND = [0.20, 0.85, 0.75, 0.30, 0.25, 0.40, 0.95, 0.10]


def kept(scores: list[float]) -> list[bool]:
    """The five smallest, as the quantile 0.7 of eight scores keeps them: floor(0.7 * 7) + 1."""
    limit = sorted(scores)[4]
    return [score <= limit for score in scores]


def text(x: float, y: float, words: str, size: int = 13, anchor: str = "middle", weight: str = "normal") -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" fill="{INK}">'
        f"{words}</text>"
    )


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{fill}" stroke="{stroke}"/>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{LINE}" stroke-width="1.5" marker-end="url(#tip)"/>'


def bars(x: float, y: float, scores: list[float]) -> list[str]:
    """Scores as bars, with the quantile's line."""
    limit = sorted(scores)[4] + 0.03
    shapes = [
        box(x + 20 * index, y + 60 - 60 * score, 14, 60 * score, FULL if keep else FROZEN)
        for index, (score, keep) in enumerate(zip(scores, kept(scores), strict=True))
    ]
    height = y + 60 - 60 * limit
    line = f'<line x1="{x - 6}" y1="{height}" x2="{x + 160}" y2="{height}" stroke="{LINE}" stroke-dasharray="4 3"/>'
    return [*shapes, line, text(x + 164, height + 4, "upper quantile", 11, "start")]


def cells(x: float, y: float, masks: list[float]) -> list[str]:
    colours = {0.0: FROZEN, 0.5: PART, 1.0: FULL}
    return [box(x + 20 * index, y, 14, 22, colours[mask]) for index, mask in enumerate(masks)]


def picture() -> str:
    """Compose the whole picture."""
    mixed = [(a + b) / 2 for a, b in zip(kept(FIRST), kept(SECOND), strict=True)]
    shapes = [
        text(110, 28, "your training pass", 15, weight="bold"),
        box(30, 42, 160, 46, "#eeeeee", LINE),
        text(110, 62, "model, with dropout"),
        text(110, 79, "loss.backward()", 12),
        box(30, 150, 160, 46, "#eeeeee", LINE),
        text(110, 170, "again, other dropout"),
        text(110, 187, "the risk pass", 12),
        arrow(110, 88, 110, 148),
        text(118, 122, "some or all rows", 11, "start"),
        text(395, 28, "a score per unit, small = robust", 15, weight="bold"),
        text(305, 52, "second order: length of the new gradient beside the momentum", 12, "start"),
        *bars(310, 60, SECOND),
        text(305, 158, "first order: gradient of the divergence of both answers", 12, "start"),
        *bars(310, 166, FIRST),
        arrow(192, 65, 300, 90),
        arrow(192, 173, 300, 196),
        text(395, 262, "masks mixed (ensemble, gamma 0.5)", 15, weight="bold"),
        arrow(387, 230, 387, 246),
        *cells(310, 274, mixed),
        arrow(480, 285, 618, 285),
        text(760, 262, "optimizer.step()", 15, weight="bold"),
        text(650, 284, "1: the optimizer's own step", 12, "start"),
        text(650, 302, "0.5: half the gradient, half the move", 12, "start"),
        text(650, 320, "0: weights and momentum stay as they are", 12, "start"),
        box(632, 273, 12, 12, FULL),
        box(632, 291, 12, 12, PART),
        box(632, 309, 12, 12, FROZEN),
        text(310, 335, "a unit: one weight tensor, or the adapter tensors of one module", 11, "start"),
    ]
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 345" width="920" '
        'font-family="sans-serif" role="img">'
        "<title>One step under ROSE</title>"
        f'<rect width="920" height="345" fill="#ffffff"/>'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{LINE}"/></marker></defs>'
    )
    return "\n".join([head, *shapes, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("how-it-works.svg").write_text(picture(), encoding="utf-8")
