"""Explanations as matplotlib figures: the picture first, then one map per class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from shapadapter.explanation.explanation import Explanation
from shapadapter.visual.canvas import (
    BAR,
    GAP,
    MARGIN,
    PANEL,
    SMALL,
    TITLE,
    Canvas,
    check_matplotlib,
    draw_bar,
    draw_panel,
    fit,
    new_canvas,
)
from shapadapter.visual.colors import symmetric_limit
from shapadapter.visual.marks import mark_signs
from shapadapter.visual.rows import Look, Row, draw_rows, make_row, mark, panel_of
from shapadapter.visual.wording import MINUS, alt_text, alt_text_of_gallery, columns, difference, number, one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from shapadapter.visual.canvas import DescribedFigure


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


_FEW = 6
"""Images that are drawn as large rows; more become a compact gallery."""


def draw_explanation(
    explanation: Explanation,
    index: int = 0,
    *,
    labels: Sequence[str | int] | None = None,
    smooth: bool = False,
    max_classes: int = 3,
    numbers: bool = False,
    contour: float | None = None,
    errors: Literal["opacity", "hatch"] | None = None,
    original: Any | None = None,
) -> Figure:
    """Draw one image and its maps.

    The maps share one colour scale, symmetric about zero, with its limits printed. Patches that speak against a class bear
    a dash, so that a print in grey can be read. Under each map stands the sum of null value and attributions beside the
    logit it must give, unless the attributions do not sum to the logits, and the relative error if it is known. The
    figure carries `alt_text` into the files it is saved as.

    Args:
        explanation: Any explanation.
        index: Which image.
        labels: Class names or indices to show; None takes the shown classes with the largest logits.
        smooth: Interpolate the maps, which the figure then says; otherwise every patch has one colour.
        max_classes: How many classes if `labels` is None.
        numbers: Write each patch's number on it; the panels grow as this needs.
        contour: Outline this share of the patches, those with the largest numbers for or against; 0.1 is a tenth.
        errors: How to show the standard errors of a refined explanation: "hatch" draws diagonals where the 95 % interval
            holds zero, "opacity" colours each patch by the end of its interval that is nearer to zero.
        original: The image as it was given to `explain`, to draw the maps on; what a crop has cut off is darker. None draws
            them on what the model saw.

    Returns:
        A figure that belongs to no window; `savefig` writes it.

    Raises:
        ImportError: If matplotlib is missing.
        ImageError: If the original is no image.
        ClassNotFoundError: If the model has no such class.
        ValueError: If a class was not computed for this image, a number is not finite, there are too many patches for
            numbers, errors or the frame of the original are asked for and not known, or an option is none of those above.
        IndexError: If there is no such image.
    """
    if errors not in (None, "opacity", "hatch"):
        raise ValueError(f'Expected errors to be "opacity", "hatch" or None, but got {errors!r}.')
    shown = columns(explanation, index, labels=labels, max_classes=max_classes)
    figure = draw_rows(
        [make_row(explanation, index, shown, Look(smooth, numbers, contour, errors), original=original)]
    )
    figure.alt_text = alt_text(explanation, index, labels=labels, max_classes=max_classes)
    return figure


def draw_contrast(
    explanation: Explanation, index: int, label: str | int, other: str | int, *, smooth: bool = False
) -> Figure:
    """Draw why the model says one class rather than another: both maps, and one minus the other.

    The difference of the maps sums, with that of the null values, to the difference of the logits. All three share one
    colour scale.

    Args:
        explanation: Any explanation that has both classes.
        index: Which image.
        label: The class to speak for, a name or an index.
        other: The class to speak against.
        smooth: As in `draw_explanation`.

    Returns:
        A figure that belongs to no window.

    Raises:
        ImportError: If matplotlib is missing.
        ClassNotFoundError: If the model has no such class.
        ValueError: If a class was not computed for this image, both are the same, or a number is not finite.
        IndexError: If there is no such image.
    """
    check_matplotlib()
    first, second = columns(explanation, index, labels=[label, other], max_classes=2)
    if first.index == second.index:
        raise ValueError(f"Expected two different classes, but both are {first.label!r}.")
    names = [fit(column.label, width=0.45 * PANEL) for column in (first, second)]
    rest = difference(explanation, index, first, second, names)
    row = make_row(explanation, index, [first, second, rest], Look(smooth))
    figure = draw_rows([row])
    pair = alt_text(explanation, index, labels=[label, other])
    figure.alt_text = f"Why {first.label} rather than {second.label}. {pair}"
    return figure


def gallery(
    explanation: Explanation,
    indices: Sequence[int] | None = None,
    *,
    max_classes: int = 2,
    smooth: bool = False,
    shared_scale: bool = False,
) -> Figure:
    """Draw several images in one figure: up to six as large rows, more as small tiles with short titles.

    Args:
        explanation: Any explanation.
        indices: Which images, in order; None takes all.
        max_classes: How many classes per image, those with the largest logits.
        smooth: As in `draw_explanation`.
        shared_scale: Give all images one colour scale, so that they can be compared; otherwise each has its own.

    Returns:
        A figure that belongs to no window.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is no image to draw, or a number is not finite.
        IndexError: If there is no such image.
    """
    chosen = list(range(len(explanation)) if indices is None else indices)
    if not chosen:
        raise ValueError("There is no image to draw.")
    shown = [columns(explanation, i, max_classes=max_classes) for i in chosen]
    values = np.stack([column.values.numpy() for several in shown for column in several])  # (maps, rows, cols)
    limit = symmetric_limit(values) if shared_scale else None
    rows = [make_row(explanation, i, one, Look(smooth), limit=limit) for i, one in zip(chosen, shown, strict=True)]
    figure = draw_rows(rows) if len(rows) <= _FEW else draw_compact(rows, limit)
    figure.alt_text = alt_text_of_gallery(explanation, chosen, max_classes)
    return figure


def draw_comparison(
    explanations: Sequence[Explanation], index: int = 0, *, label: str | int | None = None, smooth: bool = False
) -> Figure:
    """Draw one image and the maps of several methods for one class side by side.

    Each map has a colour scale of its own, symmetric about zero, for methods differ in unit. Where a map sums to the
    logit, its sum stands above it and the limits of its scale below.

    Args:
        explanations: Of the same images by the same model, one for each method; `method` is the title.
        index: Which image.
        label: A class name or index; None takes the class with the largest logit that the first explanation shows.
        smooth: Interpolate the maps, which the figure then says.

    Returns:
        A figure that belongs to no window.

    Raises:
        ImportError: If matplotlib is missing.
        ClassNotFoundError: If the model has no such class.
        ValueError: If there is no explanation, they are of different images, the class was not computed by each, or a
            number is not finite.
        IndexError: If there is no such image.
    """
    if not explanations:
        raise ValueError("There is no explanation to draw.")
    first = explanations[0]
    if not all(np.array_equal(first[index].images, one[index].images) for one in explanations):
        raise ValueError(f"Expected explanations of the same images, but image {index} differs.")
    (best,) = columns(first, index, labels=None if label is None else [label], max_classes=1)
    rows = [
        make_row(one, index, columns(one, index, labels=[best.index], max_classes=1), Look(smooth))
        for one in explanations
    ]
    panel = panel_of(rows[0])
    down = 2 * MARGIN + TITLE + panel[1] + BAR
    canvas = new_canvas(2 * MARGIN + PANEL + len(rows) * (GAP + PANEL), down)
    top = down - MARGIN - TITLE
    title = f"{fit(best.label, '  ' + best.probability)}\n{fit('predicted ' + rows[0].predicted)}"
    draw_panel(canvas, MARGIN, top, panel, rows[0].picture, title)
    for place, (one, row) in enumerate(zip(explanations, rows, strict=True)):
        left, sums = MARGIN + (place + 1) * (PANEL + GAP), one.sums_to_logits
        title = f"{fit(one_line(one.method))}\n{'Σφ=' + row.shown[0].sum if sums else ''}"
        mark(draw_panel(canvas, left, top, panel, row.pixels[0], title), row.shown[0], row)
        if sums:
            draw_bar(canvas, left + PANEL / 2, top - panel[1], row.limit, row.notes)
        else:
            canvas.text(left + PANEL / 2, top - panel[1] - 0.06, row.notes[0], SMALL, va="top")
    methods = ", ".join(one_line(one.method) for one in explanations)
    canvas.figure.alt_text = f"Maps by several methods ({methods}). {alt_text(first, index, labels=[best.index])}"
    return canvas.figure
