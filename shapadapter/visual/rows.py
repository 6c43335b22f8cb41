"""One image in a row: the picture first, then a map per class, the sum check under each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from shapadapter.data.frames import unseen
from shapadapter.data.images import eight_bits, open_image
from shapadapter.explanation.convert import Box, frame_of, laid_out
from shapadapter.explanation.explanation import Explanation
from shapadapter.visual.canvas import (
    BAR,
    GAP,
    LINE,
    MARGIN,
    PANEL,
    SMALL,
    TITLE,
    Canvas,
    draw_bar,
    draw_panel,
    fit,
    new_canvas,
)
from shapadapter.visual.colors import Bytes, Floats, overlay, symmetric_limit
from shapadapter.visual.marks import exponent, hatch, mark_signs, outline, panel_for_numbers, strongest, write_numbers
from shapadapter.visual.wording import MINUS, Column, one_line, superscript, unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from shapadapter.visual.canvas import DescribedFigure


LONGEST_SIDE = 1024
"""Of an original in a figure, in pixels."""

_DARKER = 0.7
"""What is left of the light where the model never looked."""


def picture_of(one: Explanation, original: Any | None) -> tuple[Bytes, Box]:
    """A picture (H, W, 3) and top, left, bottom and right of the maps on it, in its pixels.

    Args:
        one: an explanation of one image.
        original: the image as it was given to `explain`; None for what the model saw.

    Raises:
        ImageError: it is no image.
        ValueError: it is another image, or where it was seen is not known.
    """
    size, box = frame_of(one, original is not None)
    if original is None:
        return one.images[0].numpy(), box
    image = open_image(original)
    image = image if isinstance(image, Image.Image) else Image.fromarray(eight_bits(image))
    if image.size[::-1] != size:
        raise ValueError(
            f"Expected the image that was explained, of {size[0]} x {size[1]} pixels, got {image.height} x {image.width}."
        )
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    top, left, bottom, right = box
    down, across = image.height / size[0], image.width / size[1]
    return np.asarray(image), (top * down, left * across, bottom * down, right * across)


def lay(picture: Bytes, values: Floats, box: Box, limit: float, smooth: bool = False) -> Bytes:
    """A map (rows, cols) over a picture (H, W, 3), which is darker where the map does not reach."""
    heat = laid_out(values, (picture.shape[0], picture.shape[1]), box, smooth)  # (H, W)
    beyond = np.isnan(heat)
    drawn = overlay(picture, np.where(beyond, 0, heat), limit)
    return np.where(beyond[..., None], _DARKER * drawn, drawn).astype(np.uint8)


def note(one: Explanation) -> list[str]:
    """What a reader of a map on the original has to know."""
    share = 0.0 if one.frames is None else float(unseen(one.frames)[0])
    return [f"darker: never seen by the model, {100 * share:.0f} % of the image"] if share >= 0.005 else []


_SURE = 1.96  # standard errors: what the interval of 95 % reaches to each side
_ACROSS = 5  # maps
_WIDEST = 4.8  # inches, of a panel with numbers
_LONG = 3  # times as long as wide is a panel at most


@dataclass(frozen=True)
class Look:
    """How maps are drawn; see `draw_explanation`."""

    smooth: bool = False
    numbers: bool = False
    contour: float | None = None
    errors: Literal["opacity", "hatch"] | None = None


@dataclass(frozen=True)
class Row:
    """One image, ready to be drawn: k maps, which share a scale."""

    picture: Bytes  # (H, W, 3)
    pixels: list[Bytes]  # of each map, (H, W, 3)
    shown: list[Column]
    limit: float
    box: Box  # of the maps on the picture, in its pixels
    predicted: str
    notes: list[str]
    look: Look

    @property
    def whole(self) -> bool:
        """Whether the maps cover the whole picture."""
        return self.box == (0, 0, *self.picture.shape[:2])

    @property
    def check(self) -> float:
        """How high the lines under the maps are, in inches."""
        return LINE * (1 + max(len(column.check.splitlines()) for column in self.shown))

    @property
    def bar(self) -> float:
        """How high the scale and its notes are, in inches."""
        return BAR + LINE * (len(self.notes) - 1)


def make_row(
    explanation: Explanation,
    index: int,
    shown: list[Column],
    look: Look,
    *,
    limit: float | None = None,
    original: Any | None = None,
) -> Row:
    """Colour the maps of one image, on the scale of the largest number unless another limit is given.

    Raises:
        ValueError: If errors are asked for and not known, or the frame of the original.
    """
    one = explanation[index]
    picture, box = picture_of(one, original)
    values = np.stack([column.values.numpy() for column in shown])  # (k, rows, cols)
    largest = symmetric_limit(values) if limit is None else limit
    return Row(
        picture=picture,
        pixels=[lay(picture, _kept(column, look), box, largest, look.smooth) for column in shown],
        shown=shown,
        limit=largest,
        box=box,
        predicted=one_line(one.top(1)[0][0].label),
        notes=_notes(explanation, look, largest) + ([] if original is None else note(one)),
        look=look,
    )


def draw_rows(rows: Sequence[Row]) -> DescribedFigure:
    """Place rows below each other; more than five maps of an image take several lines."""
    most = max(len(row.pixels) for row in rows)
    lines = -(-most // _ACROSS)
    across = -(-most // lines)
    width, height = panel_of(rows[0])
    line = TITLE + height + max(row.check for row in rows)
    step = lines * line + max(row.bar for row in rows)
    down = 2 * MARGIN + len(rows) * step
    canvas = new_canvas(2 * MARGIN + width + across * (GAP + width), down)
    for place, row in enumerate(rows):
        _draw_row(canvas, down - MARGIN - TITLE - place * step, (width, height), row, across, line)
    return canvas.figure


def panel_of(row: Row) -> tuple[float, float]:
    """Width and height of each panel in inches."""
    aspect = min(max(row.picture.shape[0] / row.picture.shape[1], 1 / _LONG), _LONG)
    grid = (row.shown[0].values.shape[0], row.shown[0].values.shape[1])
    width = panel_for_numbers(grid, aspect, PANEL, _WIDEST) if row.look.numbers else PANEL
    return width, width * aspect


def mark(axes: Axes, column: Column, row: Row, panel: Axes | None = None) -> None:
    """Draw on a map what the look asks for, inside a panel that may be smaller."""
    values = column.values.numpy()
    if row.look.errors == "hatch":
        assert column.errors is not None, "make_row has looked"
        hatch(axes, np.abs(values) < _SURE * column.errors.numpy())
    if row.look.contour is not None:
        outline(axes, strongest(values, row.look.contour))
    if row.look.numbers:
        write_numbers(axes, values, row.limit, float(column.sum.replace(MINUS, "-")))
    else:
        mark_signs(axes, _kept(column, row.look), row.limit)
    if panel is not None and panel is not axes:
        for artist in (*axes.collections, *axes.texts):
            artist.set_clip_path(panel.patch)
            artist.set_clip_on(True)


def _part(canvas: Canvas, corner: tuple[float, float], panel: tuple[float, float], row: Row) -> Axes:
    """Axes over the part of a panel where the maps are, below the panel's upper left corner, in patches."""
    (height, width), (top, left, bottom, right) = row.picture.shape[:2], row.box
    across, down = panel[0] / width, panel[1] / height
    axes = canvas.axes(
        corner[0] + left * across, corner[1] - bottom * down, (right - left) * across, (bottom - top) * down
    )
    axes.patch.set_visible(False)
    axes.spines[:].set_visible(False)
    rows, cols = row.shown[0].values.shape
    axes.set(xlim=(-0.5, cols - 0.5), ylim=(rows - 0.5, -0.5))
    return axes


def _draw_row(canvas: Canvas, top: float, panel: tuple[float, float], row: Row, across: int, line: float) -> None:
    """Draw one image whose panels begin at `top`, `across` maps beside each other on lines that are `line` high."""
    width, height = panel
    draw_panel(canvas, MARGIN, top, panel, row.picture, f"predicted\n{fit(row.predicted, width=width)}")
    first = MARGIN + width + GAP
    for place, (pixels, column) in enumerate(zip(row.pixels, row.shown, strict=True)):
        left, upper = first + place % across * (width + GAP), top - place // across * line
        probability = f"  {column.probability}" if column.probability else ""
        title = f"{fit(column.label, probability, width=width)}\n{fit(column.total, width=width)}"
        axes = draw_panel(canvas, left, upper, panel, pixels, title)
        mark(axes if row.whole else _part(canvas, (left, upper), panel, row), column, row, axes)
        canvas.text(left + width / 2, upper - height - 0.06, column.check, SMALL, va="top")
    beside, lines = min(across, len(row.pixels)), -(-len(row.pixels) // across)
    middle = first + (beside * (width + GAP) - GAP) / 2
    draw_bar(canvas, middle, top - height - row.check - (lines - 1) * line, row.limit, row.notes)


def _kept(column: Column, look: Look) -> Floats:
    """What is coloured of each number: (rows, cols); with "opacity" the end of its interval that is nearer to zero."""
    if look.errors is not None and column.errors is None:
        raise ValueError(
            f"Standard errors of class {column.label!r} are not known: explain again with refine=256, or leave out "
            f"errors={look.errors!r}."
        )
    values = column.values.numpy()
    if look.errors != "opacity":
        return values
    assert column.errors is not None, "make_row has looked"
    return np.sign(values) * np.maximum(0, np.abs(values) - _SURE * column.errors.numpy())


def _notes(explanation: Explanation, look: Look, limit: float) -> list[str]:
    power = exponent(limit)
    found = [unit(explanation) + (", smoothed" if look.smooth else "")]
    if look.numbers and power:
        found.append(f"numbers \N{MULTIPLICATION SIGN} 10{superscript(power)}")
    if look.contour is not None:
        found.append(f"outlined: strongest {100 * look.contour:g} % of patches")
    if look.errors == "hatch":
        found.append("hatched: 95 % interval holds zero")
    if look.errors == "opacity":
        found.append("coloured: what the 95 % interval leaves sure")
    return found
