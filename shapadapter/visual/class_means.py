"""Mean maps of classes as a figure: mean picture, mean map and spread, with the number of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .canvas import BAR, BAR_HEIGHT, BAR_WIDTH, GAP, MARGIN, SMALL, Canvas, draw_bar, draw_panel, fit, new_canvas
from .maps import Bytes, Floats, overlay, symmetric_limit
from .marks import hatch, mark_signs
from .means import MeanMaps
from .wording import NO_UNIT, UNIT, number, one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANEL, _BETWEEN, _TITLE = 1.45, 0.08, 0.56
_SURE = 2.0  # standard errors from zero


def draw_class_means(means: MeanMaps, *, labels: Sequence[str | int] | None = None, max_classes: int = 10) -> Figure:
    """Draw the mean map of each class beside the mean picture and the spread over the images.

    All maps share one colour scale, all spreads another. A patch whose mean is less than two standard errors from zero
    is hatched: more images may turn its sign. One map is never the whole truth, so each names its number of images.

    Args:
        means: What `mean_maps` found.
        labels: Class names or indices, in the order wanted; None takes those with the most images.
        max_classes: How many if `labels` is None.

    Returns:
        A figure that belongs to no window.

    Raises:
        ImportError: If matplotlib is missing.
        ClassNotFoundError: If the model has no such class.
        ValueError: If a class has no image, or there is no class to draw.
    """
    places = _chosen(means, labels, max_classes)
    limit = symmetric_limit(means.means[places].numpy())
    spread = float(means.deviations[places].nan_to_num(nan=0.0).max())  # nan of one image, which has no spread
    across = 1 if len(places) <= 3 else 2
    height, width = means.pictures.shape[1:3]
    panel = (_PANEL, _PANEL * height / width)
    block, step, bars = 3 * _PANEL + 2 * _BETWEEN, _TITLE + panel[1] + 0.1, BAR + 0.14
    lines = -(-len(places) // across)
    canvas = new_canvas(2 * MARGIN + across * (block + GAP) - GAP, 2 * MARGIN + lines * step + bars)
    for index, place in enumerate(places):
        row, col = divmod(index, across)
        left, top = MARGIN + col * (block + GAP), canvas.down - MARGIN - _TITLE - row * step
        _draw_class(canvas, means, place, (left, top), panel, (limit, spread))
    notes = [UNIT if means.sums_to_logits else NO_UNIT, "hatched: less than 2 standard errors from 0"]
    draw_bar(canvas, canvas.across / 2 - 1.05, MARGIN + bars, limit, notes)
    _draw_spread_bar(canvas, canvas.across / 2 + 1.4, MARGIN + bars, spread)
    canvas.figure.alt_text = _in_words(means, places)
    return canvas.figure


def _chosen(means: MeanMaps, labels: Sequence[str | int] | None, max_classes: int) -> list[int]:
    """Which of the C maps to draw."""
    if labels is None:
        order = means.counts.argsort(descending=True, stable=True).tolist()
        places = sorted(order[: max(max_classes, 0)])
    else:
        places = [means.place(label) for label in labels]
    if not places:
        raise ValueError("There is no class to draw: pass labels, or max_classes of at least 1.")
    return places


def _draw_class(
    canvas: Canvas,
    means: MeanMaps,
    place: int,
    corner: tuple[float, float],
    panel: tuple[float, float],
    limits: tuple[float, float],
) -> None:
    """Draw one class below its upper left corner; the limits are those of the means and of the deviations."""
    (left, top), (limit, spread) = corner, limits
    picture = means.pictures[place].numpy()
    values, deviations = means.means[place].numpy(), means.deviations[place].nan_to_num(nan=0.0).numpy()
    count, step = int(means.counts[place]), _PANEL + _BETWEEN
    name = fit(one_line(means.labels[int(means.classes[place])]), f"  ({_images(count)} {means.by})", width=3 * _PANEL)
    canvas.text(left, top + 0.27, name, 9.0, ha="left", va="bottom")
    total = f"mean, Σφ={number(float(values.sum()), sign=True)}" if means.sums_to_logits else "mean"
    draw_panel(canvas, left, top, panel, picture, "mean picture", SMALL)
    axes = draw_panel(
        canvas, left + step, top, panel, overlay(picture, _enlarge(values, picture), limit), total, SMALL
    )
    if count > 1:
        hatch(axes, np.abs(values) < _SURE * deviations / np.sqrt(count))
    mark_signs(axes, values, limit)
    words = "standard deviation" if count > 1 else "spread unknown"
    draw_panel(canvas, left + 2 * step, top, panel, _greys(_enlarge(deviations, picture), spread), words, SMALL)


def _draw_spread_bar(canvas: Canvas, middle: float, top: float, spread: float) -> None:
    left, bottom = middle - BAR_WIDTH / 2, top - BAR_HEIGHT - 0.08
    axes = canvas.axes(left, bottom, BAR_WIDTH, BAR_HEIGHT)
    axes.imshow(_greys(np.linspace(0, 1, 255)[None], 1.0), aspect="auto")
    axes.spines[:].set(color="0.7", linewidth=0.5)
    canvas.text(left, bottom - 0.04, "0", SMALL, va="top")
    canvas.text(left + BAR_WIDTH, bottom - 0.04, number(spread), SMALL, va="top")
    canvas.text(middle, bottom - 0.19, "standard deviation over images", SMALL, va="top")


def _greys(values: Floats, limit: float) -> Bytes:
    """White for nothing, near black for the limit: (...) -> (..., 3)."""
    share = values / limit if limit > 0 else np.zeros_like(values)
    return np.repeat(np.rint(255 - 215 * share).astype(np.uint8)[..., None], 3, axis=-1)


def _enlarge(values: Floats, picture: Bytes) -> Floats:
    """(rows, cols) -> (h, w), whole multiples of them."""
    height, width = (side // count for side, count in zip(picture.shape[:2], values.shape, strict=True))
    return values.repeat(height, axis=0).repeat(width, axis=1)


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _in_words(means: MeanMaps, places: Sequence[int]) -> str:
    parts = []
    for place in places:
        values = means.means[place]
        row, col = divmod(int(values.argmax()), values.shape[1])
        parts.append(
            f"{one_line(means.labels[int(means.classes[place])])}, {_images(int(means.counts[place]))}: most in favour is "
            f"the patch in row {row + 1}, column {col + 1}, {number(float(values.max()), sign=True)}"
        )
    return f"Mean attribution maps of images {means.by} as a class. {'; '.join(parts)}."
