"""Explanations as matplotlib figures and as small strips: the picture first, then one map per class or method."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from shapadapter.core.phrases import one_line
from shapadapter.visual.canvas import (
    BAR,
    GAP,
    MARGIN,
    PANEL,
    SMALL,
    TITLE,
    draw_bar,
    draw_panel,
    fit,
    new_canvas,
)
from shapadapter.visual.maps import symmetric_limit
from shapadapter.visual.panels import Look, draw_map, draw_rows, draw_tiles, make_row
from shapadapter.visual.wording import Column, alt_text, columns, difference, gallery_alt_text, level, method_name

if TYPE_CHECKING:
    from shapadapter.explanation.explanation import Explanation

_MOST_ROWS = 6  # images that are drawn as large rows; more become tiles


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

    The maps share one color scale, symmetric about zero, with its limits printed. Patches that speak against a class bear
    a dash, so that a print in gray can be read. Under each map stands the sum of null value and attributions beside the
    logit it must give, unless the attributions do not sum to the logits; the level, such as "forward and backward pass"; and
    the expected error if it is known. The figure carries `alt_text` into the files it is saved as.

    Args:
        explanation: Any explanation.
        index: Which image.
        labels: Class names or indices to show; None takes the shown classes with the largest logits.
        smooth: Interpolate the maps, which the figure then says; otherwise every patch has one color.
        max_classes: How many classes if `labels` is None.
        numbers: Write each patch's number on it; the panels grow as this needs.
        contour: Outline this share of the patches, those with the largest numbers for or against; 0.1 is a tenth.
        errors: How to show the standard errors of a refined explanation: "hatch" draws diagonals where the 95 % interval
            holds zero, "opacity" colors each patch by the end of its interval that is nearer to zero.
        original: The image as it was given to `explain`, to draw the maps on; what a crop has cut off is darker. None draws
            them on what the model saw.

    Returns:
        A figure that belongs to no window; `savefig` writes it.

    Raises:
        ImageError: If the original is no image.
        ClassNotFoundError: If the model has no such class.
        ValueError: If a class was not computed for this image, a number is not finite, there are too many patches for
            numbers, errors or the frame of the original are asked for and not known, or an option is none of those above.
        IndexError: If there is no such image.
    """
    if errors not in (None, "opacity", "hatch"):
        raise ValueError(f'Expected errors to be "opacity", "hatch" or None, but got {errors!r}.')
    shown = columns(explanation, index, labels=labels, max_classes=max_classes)
    look = Look(smooth, numbers, contour, errors)
    figure = draw_rows([make_row(explanation, index, shown, look, original=original)])
    figure.alt_text = alt_text(explanation, index, labels=labels, max_classes=max_classes)
    return figure


def draw_contrast(
    explanation: Explanation, index: int, label: str | int, other: str | int, *, smooth: bool = False
) -> Figure:
    """Draw why the model says one class rather than another: both maps, and one minus the other, on one color scale.

    The difference of the maps sums, with that of the null values, to the difference of the logits.

    Args:
        explanation: Any explanation that has both classes.
        index: Which image.
        label: The class to speak for, a name or an index.
        other: The class to speak against.
        smooth: As in `draw_explanation`.

    Returns:
        A figure that belongs to no window.

    Raises:
        ValueError: If both classes are the same; and what `draw_explanation` raises.
    """
    first, second = columns(explanation, index, labels=[label, other], max_classes=2)
    if first.index == second.index:
        raise ValueError(f"Expected two different classes, but both are {first.label!r}.")
    names = [fit(column.label, width=0.45 * PANEL) for column in (first, second)]
    rest = difference(explanation, index, first, second, names)
    figure = draw_rows([make_row(explanation, index, [first, second, rest], Look(smooth))])
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
        shared_scale: Give all images one color scale, so that they can be compared; otherwise each has its own.

    Returns:
        A figure that belongs to no window.

    Raises:
        ValueError: If there is no image to draw, or a number is not finite.
        IndexError: If there is no such image.
    """
    chosen = list(range(len(explanation)) if indices is None else indices)
    if not chosen:
        raise ValueError("There is no image to draw.")
    shown = [columns(explanation, i, max_classes=max_classes) for i in chosen]
    made, limit = level([explanation[i] for i in chosen]), None
    if shared_scale:
        limit = symmetric_limit(np.stack([column.values.numpy() for several in shown for column in several]))
    rows = [make_row(explanation, i, one, Look(smooth), limit=limit) for i, one in zip(chosen, shown, strict=True)]
    figure = draw_rows(rows) if len(rows) <= _MOST_ROWS else draw_tiles(rows, limit, made)
    figure.alt_text = gallery_alt_text(explanation, chosen, max_classes)
    return figure


def draw_comparison(
    explanations: Sequence[Explanation], index: int = 0, *, label: str | int | None = None, smooth: bool = False
) -> Figure:
    """Draw one image and the maps of several methods for one class side by side.

    Each map has a color scale of its own, symmetric about zero, for methods differ in unit. Where a map sums to the
    logit, its sum stands above it and the limits of its scale below.

    Args:
        explanations: Of the same images by the same model, one for each method; `method` is the title.
        index: Which image.
        label: A class name or index; None takes the class with the largest logit that the first explanation shows.
        smooth: Interpolate the maps, which the figure then says.

    Returns:
        A figure that belongs to no window.

    Raises:
        ValueError: If there is no explanation, or they are of different images; and what `draw_explanation` raises.
    """
    if not explanations:
        raise ValueError("There is no explanation to draw.")
    first = explanations[0]
    if not all(np.array_equal(first[index].images, one[index].images) for one in explanations):
        raise ValueError(f"Expected explanations of the same images, but image {index} differs.")
    (best,) = columns(first, index, labels=None if label is None else [label], max_classes=1)
    shown = [columns(one, index, labels=[best.index], max_classes=1) for one in explanations]
    rows = [make_row(one, index, column, Look(smooth)) for one, column in zip(explanations, shown, strict=True)]
    panel = rows[0].panel
    canvas = new_canvas(2 * MARGIN + PANEL + len(rows) * (GAP + PANEL), 2 * MARGIN + TITLE + panel[1] + BAR)
    top = canvas.down - MARGIN - TITLE
    title = f"{fit(best.label, '  ' + best.probability)}\n{fit('predicted ' + rows[0].predicted)}"
    draw_panel(canvas, MARGIN, top, panel, rows[0].picture, title)
    for place, (one, row) in enumerate(zip(explanations, rows, strict=True)):
        left, sums = MARGIN + (place + 1) * (PANEL + GAP), one.sums_to_logits
        title = f"{fit(method_name(one.method))}\n{'Σφ=' + row.shown[0].sum if sums else ''}"
        draw_map(canvas, left, top, panel, row, 0, title)
        if sums:
            draw_bar(canvas, left + PANEL / 2, top - panel[1], row.limit, row.notes)
        else:
            canvas.text(left + PANEL / 2, top - panel[1] - 0.06, row.notes[0], SMALL, va="top")
    methods = ", ".join(method_name(one.method) for one in explanations)
    canvas.figure.alt_text = f"Maps by several methods ({methods}). {alt_text(first, index, labels=[best.index])}"
    return canvas.figure


# -- strips: small pictures for model cards, measured in pixels --------------------------------------------------------

_HEIGHT = 184  # of image and maps: four of them beside each other are as wide as a page of the Hub
_GAP, _LINE = 8, 20
_INK, _FAINT = "#1f2937", "#6b7280"
_DPI = 128  # a power of two: pixels as inches are exact, and no edge lies between two
_FONT = 14 * 72 / _DPI


def draw_strip(
    explanation: Explanation,
    index: int = 0,
    *,
    max_classes: int = 3,
    caption: str = "",
    height: int = _HEIGHT,
    original: Any | None = None,
) -> Image.Image:
    """Draw one image, and beside it the maps of its likeliest shown classes, which share their colors, as a small picture.

    Below the image stands how the maps were made, such as "one forward pass".

    Args:
        explanation: Any explanation.
        index: Which image.
        max_classes: How many maps at most.
        caption: A line of its own below the image, such as what it shows.
        height: Of image and maps, in pixels.
        original: The image as it was given to `explain`, to draw the maps on; None draws them on what the model saw.

    Returns:
        An RGB picture.

    Raises:
        ValueError: If a number is not finite, or the frame of the original is not known.
        IndexError: If there is no such image.
    """
    shown = columns(explanation, index, max_classes=max_classes)
    row = make_row(explanation, index, shown, Look(), original=original, height=height)
    width = row.picture.shape[1]
    made = level([explanation[index]]).replace(" and ", " + ")  # the image is narrow
    lines = [(caption, made), *map(_strip_lines, shown)]
    across, down = len(lines) * (width + _GAP) + _GAP, height + 3 * _GAP + 2 * _LINE
    canvas = new_canvas(across / _DPI, down / _DPI, dpi=_DPI)
    panel, top = (width / _DPI, height / _DPI), (down - _GAP) / _DPI
    for place, texts in enumerate(lines):
        left = (_GAP + place * (width + _GAP)) / _DPI
        if place == 0:
            draw_panel(canvas, left, top, panel, row.picture, "")
        else:
            draw_map(canvas, left, top, panel, row, place - 1)
        for line, (text, color) in enumerate(zip(texts, (_INK, _FAINT), strict=True)):
            words = fit(one_line(text), width=panel[0], size=_FONT)
            bottom = top - panel[1] - (_GAP + line * _LINE) / _DPI
            canvas.text(left, bottom, words, _FONT, ha="left", va="top", color=color)
    agg = FigureCanvasAgg(canvas.figure)
    agg.draw()
    return Image.fromarray(np.asarray(agg.buffer_rgba())[..., :3].copy())  # (H, W, 4) -> (H, W, 3)


def describe_strip(explanation: Explanation, index: int = 0, *, max_classes: int = 3, caption: str = "") -> str:
    """What `draw_strip` shows, in words, for those who do not see the picture."""
    shown = "; ".join(map(" ".join, map(_strip_lines, columns(explanation, index, max_classes=max_classes))))
    return f"Attribution maps of an image{f' ({caption})' if caption else ''}: {shown}"


def _strip_lines(column: Column) -> tuple[str, str]:
    return column.label, f"{column.probability}, sum {column.sum}"


def sample_pictures(
    explanation: Explanation, max_classes: int, labels: Sequence[int] | None = None
) -> tuple[dict[str, bytes], list[dict[str, str]]]:
    """Draw every image of an explanation as a strip; files by name, and of each its name, description and level."""
    files, listed = {}, []
    for index in range(len(explanation)):
        known = labels is not None and 0 <= labels[index] < len(explanation.labels)
        caption = f"labelled {explanation.labels[labels[index]]}" if labels is not None and known else ""
        name, file = f"explanation-{index + 1}.png", io.BytesIO()
        draw_strip(explanation, index, max_classes=max_classes, caption=caption).save(file, "png")
        files[name] = file.getvalue()
        said = describe_strip(explanation, index, max_classes=max_classes, caption=caption)
        listed.append({"file": name, "alt": said, "level": level([explanation[index]])})
    return files, listed
