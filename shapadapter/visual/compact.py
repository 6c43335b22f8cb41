"""Many images in one figure: small tiles, several images beside each other, one legend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .canvas import BAR, MARGIN, Canvas, draw_bar, draw_panel, fit, new_canvas
from .marks import mark_signs
from .rows import Row
from .wording import MINUS, number

if TYPE_CHECKING:
    from .described import DescribedFigure

# Inches and points.
_PANEL, _BETWEEN, _APART, _TITLE, _BELOW = 1.0, 0.06, 0.28, 0.34, 0.22
_WIDEST, _FONT = 11.0, 6.5


def draw_compact(rows: Sequence[Row], limit: float | None) -> DescribedFigure:
    """Draw images as tiles, left to right and down.

    Args:
        rows: The images, of one size.
        limit: The colour scale that they share, None if each has its own.
    """
    most = max(len(row.pixels) for row in rows)
    panel = (_PANEL, _PANEL * rows[0].picture.shape[0] / rows[0].picture.shape[1])
    block = (1 + most) * (_PANEL + _BETWEEN) - _BETWEEN
    across = max(1, min(len(rows), int((_WIDEST + _APART) / (block + _APART))))
    lines, step = -(-len(rows) // across), _TITLE + panel[1] + _BELOW
    # Wide enough for the words beside and below the scale.
    width = max(2 * MARGIN + across * (block + _APART) - _APART, 4.0)
    canvas = new_canvas(width, 2 * MARGIN + lines * step + BAR)
    for place, row in enumerate(rows):
        line, column = divmod(place, across)
        top = canvas.down - MARGIN - _TITLE - line * step
        _draw_image(canvas, MARGIN + column * (block + _APART), top, panel, row, limit is None)
    notes = [*rows[0].notes, *(["the limit of each image's own scale stands below it"] if limit is None else [])]
    ends = None if limit is not None else (MINUS, "0", "+")
    draw_bar(canvas, width / 2, MARGIN + BAR, limit or 0.0, notes, numbers=ends)
    return canvas.figure


def _draw_image(canvas: Canvas, left: float, top: float, panel: tuple[float, float], row: Row, own: bool) -> None:
    name = fit(row.predicted, width=_PANEL, size=_FONT)
    draw_panel(canvas, left, top, panel, row.picture, f"predicted\n{name}", _FONT)
    for place, (pixels, column) in enumerate(zip(row.pixels, row.shown, strict=True)):
        corner = left + (place + 1) * (_PANEL + _BETWEEN)
        lines = (fit(column.label, f" {column.probability}", width=_PANEL, size=_FONT), column.total)
        title = "\n".join([lines[0], fit(lines[1], width=_PANEL, size=_FONT)])
        axes = draw_panel(canvas, corner, top, panel, pixels, title, _FONT)
        mark_signs(axes, column.values.numpy(), row.limit)
    if own:
        canvas.text(left + _PANEL / 2, top - panel[1] - 0.04, f"scale ±{number(row.limit)}", _FONT - 0.5, va="top")
