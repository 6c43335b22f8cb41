"""Images beside their maps, one map per class: as large rows with the sum check under each map, or as small tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from shapadapter.core.grid import Box, frame_of, laid_out
from shapadapter.core.phrases import one_line
from shapadapter.data.images import eight_bits, open_image
from shapadapter.data.processors import unseen
from shapadapter.visual.canvas import (
    BAR,
    GAP,
    LARGE,
    LINE,
    MARGIN,
    PANEL,
    SMALL,
    TITLE,
    Canvas,
    DescribedFigure,
    draw_bar,
    draw_panel,
    fit,
    new_canvas,
)
from shapadapter.visual.maps import (
    Bytes,
    Floats,
    exponent,
    hatch,
    mark_signs,
    outline,
    overlay,
    strongest,
    symmetric_limit,
    width_for_numbers,
    write_numbers,
)
from shapadapter.visual.wording import MINUS, Column, number, unit

if TYPE_CHECKING:
    from shapadapter.explanation.explanation import Explanation

_LONGEST_SIDE = 1024  # of an original in a figure, in pixels
_DARKER = 0.7  # what is left of the light where the model never looked
_SURE = 1.96  # standard errors: what the interval of 95 % reaches to each side
_ACROSS = 5  # maps
_WIDEST_PANEL = 4.8  # inches, with numbers
_LONG = 3  # times as long as wide is a panel at most
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


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
    def panel(self) -> tuple[float, float]:
        """Width and height of each panel in inches."""
        aspect = min(max(self.picture.shape[0] / self.picture.shape[1], 1 / _LONG), _LONG)
        rows, cols = self.shown[0].values.shape
        width = width_for_numbers((rows, cols), aspect, PANEL, _WIDEST_PANEL) if self.look.numbers else PANEL
        return width, width * aspect


def make_row(
    explanation: Explanation,
    index: int,
    shown: list[Column],
    look: Look,
    *,
    limit: float | None = None,
    original: Any | None = None,
    height: int | None = None,
) -> Row:
    """Color the maps of one image, on the scale of the largest number unless another limit is given.

    They lie on what the model saw, or on `original`, the image as it was given to `explain`, resized to a height in
    pixels if one is given.
    """
    one = explanation[index]
    picture, box = _picture(one, original)
    if height is not None:
        (tall, wide), width = picture.size[::-1], round(height * picture.width / picture.height)
        picture = picture.resize((max(height // 3, min(3 * height, width)), height), Image.Resampling.BICUBIC)
        down, across = picture.height / tall, picture.width / wide
        box = (box[0] * down, box[1] * across, box[2] * down, box[3] * across)
    drawn_on = np.asarray(picture)
    if limit is None:
        limit = symmetric_limit(np.stack([column.values.numpy() for column in shown]))  # (k, rows, cols)
    return Row(
        picture=drawn_on,
        pixels=[_laid_over(drawn_on, _kept(column, look), box, limit, look.smooth) for column in shown],
        shown=shown,
        limit=limit,
        box=box,
        predicted=one_line(one.top(1)[0][0].label),
        notes=_notes(explanation, one, look, limit, original is not None),
        look=look,
    )


def _picture(one: Explanation, original: Any | None) -> tuple[Image.Image, Box]:
    """What the maps of one image are drawn on, and where on it they lie, in its pixels."""
    if original is None:
        return Image.fromarray(one.images[0].numpy()), (0, 0, *one.images.shape[1:3])
    size, box = frame_of(None if one.frames is None else one.frames[0])
    image = open_image(original)
    image = image if isinstance(image, Image.Image) else Image.fromarray(eight_bits(image))
    if image.size[::-1] != size:
        raise ValueError(
            f"Expected the image that was explained, of {size[0]} x {size[1]} pixels, got {image.height} x {image.width}."
        )
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    top, left, bottom, right = box
    down, across = image.height / size[0], image.width / size[1]
    return image, (top * down, left * across, bottom * down, right * across)


def _laid_over(picture: Bytes, values: Floats, box: Box, limit: float, smooth: bool) -> Bytes:
    """A map (rows, cols) over a picture (H, W, 3), which is darker where the map does not reach."""
    heat = laid_out(values, (picture.shape[0], picture.shape[1]), box, smooth)  # (H, W)
    beyond = np.isnan(heat)
    drawn = overlay(picture, np.where(beyond, 0, heat), limit)
    return np.where(beyond[..., None], _DARKER * drawn, drawn).astype(np.uint8)


def _kept(column: Column, look: Look) -> Floats:
    """What is colored of each number: (rows, cols); with "opacity" the end of its interval that is nearer to zero."""
    values = column.values.numpy()
    if look.errors is None:
        return values
    if column.errors is None:
        raise ValueError(
            f"Standard errors of class {column.label!r} are not known: explain again with refine=256, or leave out "
            f"errors={look.errors!r}."
        )
    if look.errors == "hatch":
        return values
    return np.sign(values) * np.maximum(0, np.abs(values) - _SURE * column.errors.numpy())


def _notes(explanation: Explanation, one: Explanation, look: Look, limit: float, original: bool) -> list[str]:
    """What a reader of the maps has to know, in lines."""
    power = exponent(limit)
    found = [unit(explanation) + (", smoothed" if look.smooth else "")]
    if look.numbers and power:
        found.append(f"numbers \N{MULTIPLICATION SIGN} 10{str(power).translate(_SUPERSCRIPTS)}")
    if look.contour is not None:
        found.append(f"outlined: strongest {100 * look.contour:g} % of patches")
    if look.errors == "hatch":
        found.append("hatched: 95 % interval holds zero")
    if look.errors == "opacity":
        found.append("colored: what the 95 % interval leaves sure")
    share = float(unseen(one.frames)[0]) if original and one.frames is not None else 0.0
    if share >= 0.005:
        found.append(f"darker: never seen by the model, {100 * share:.0f} % of the image")
    return found


def draw_map(
    canvas: Canvas,
    left: float,
    top: float,
    panel: tuple[float, float],
    row: Row,
    place: int,
    title: str = "",
    font: float = LARGE,
) -> None:
    """Draw one map of a row below an upper left corner, with the marks that its look asks for."""
    axes = draw_panel(canvas, left, top, panel, row.pixels[place], title, font)
    (height, width), column, look = row.picture.shape[:2], row.shown[place], row.look
    marked = axes
    if row.box != (0, 0, height, width):  # marks need axes that the map fills
        marked = _axes_of_box(canvas, (left, top), (panel[0] / width, panel[1] / height), row.box)
        rows, cols = column.values.shape
        marked.set(xlim=(-0.5, cols - 0.5), ylim=(rows - 0.5, -0.5))
    values = column.values.numpy()
    if look.errors == "hatch" and column.errors is not None:
        hatch(marked, np.abs(values) < _SURE * column.errors.numpy())
    if look.contour is not None:
        outline(marked, strongest(values, look.contour))
    if look.numbers:
        write_numbers(marked, values, row.limit, float(column.sum.replace(MINUS, "-")))
    else:
        mark_signs(marked, _kept(column, look), row.limit)
    if marked is not axes:
        for artist in (*marked.collections, *marked.texts):
            artist.set_clip_path(axes.patch)
            artist.set_clip_on(True)


def _axes_of_box(canvas: Canvas, corner: tuple[float, float], scale: tuple[float, float], box: Box) -> Axes:
    """Invisible axes over a box of pixels, whose width and height in inches is `scale`, below an upper left corner."""
    (left, top), (across, down) = corner, scale
    axes = canvas.axes(
        left + box[1] * across, top - box[2] * down, (box[3] - box[1]) * across, (box[2] - box[0]) * down
    )
    axes.patch.set_visible(False)
    axes.spines[:].set_visible(False)
    return axes


def draw_rows(rows: Sequence[Row]) -> DescribedFigure:
    """Place rows below each other; more than five maps of an image take several lines."""
    most = max(len(row.pixels) for row in rows)
    lines = -(-most // _ACROSS)
    across = -(-most // lines)
    width, height = rows[0].panel
    checks = [LINE * (1 + max(len(column.check.splitlines()) for column in row.shown)) for row in rows]
    line = TITLE + height + max(checks)
    step = lines * line + max(BAR + LINE * (len(row.notes) - 1) for row in rows)
    canvas = new_canvas(2 * MARGIN + width + across * (GAP + width), 2 * MARGIN + len(rows) * step)
    first = MARGIN + width + GAP
    for nth, (row, check) in enumerate(zip(rows, checks, strict=True)):
        top = canvas.down - MARGIN - TITLE - nth * step
        name = fit(row.predicted, width=width)
        draw_panel(canvas, MARGIN, top, (width, height), row.picture, f"predicted\n{name}")
        for place, column in enumerate(row.shown):
            left, upper = first + place % across * (width + GAP), top - place // across * line
            probability = f"  {column.probability}" if column.probability else ""
            title = f"{fit(column.label, probability, width=width)}\n{fit(column.total, width=width)}"
            draw_map(canvas, left, upper, (width, height), row, place, title)
            canvas.text(left + width / 2, upper - height - 0.06, column.check, SMALL, va="top")
        used, beside = -(-len(row.pixels) // across), min(across, len(row.pixels))
        middle = first + (beside * (width + GAP) - GAP) / 2
        draw_bar(canvas, middle, top - height - check - (used - 1) * line, row.limit, row.notes)
    return canvas.figure


# Of tiles, in inches and points.
_TILE, _BETWEEN, _APART, _ABOVE, _BELOW = 1.0, 0.06, 0.28, 0.34, 0.22
_WIDEST, _FONT = 11.0, 6.5


def draw_tiles(rows: Sequence[Row], limit: float | None, made: str) -> DescribedFigure:
    """Draw images of one size as tiles, left to right and down.

    `limit` is of their common scale, None without one; `made` says how the maps were made.
    """
    most = max(len(row.pixels) for row in rows)
    panel = (_TILE, _TILE * rows[0].picture.shape[0] / rows[0].picture.shape[1])
    block = (1 + most) * (_TILE + _BETWEEN) - _BETWEEN
    across = max(1, min(len(rows), int((_WIDEST + _APART) / (block + _APART))))
    lines, step = -(-len(rows) // across), _ABOVE + panel[1] + _BELOW
    # Wide enough for the words beside and below the scale.
    width = max(2 * MARGIN + across * (block + _APART) - _APART, 4.0)
    canvas = new_canvas(width, 2 * MARGIN + lines * step + BAR)

    def short(name: str, rest: str = "") -> str:
        return fit(name, rest, width=_TILE, size=_FONT)

    for tile, row in enumerate(rows):
        line, column = divmod(tile, across)
        left, top = MARGIN + column * (block + _APART), canvas.down - MARGIN - _ABOVE - line * step
        draw_panel(canvas, left, top, panel, row.picture, f"predicted\n{short(row.predicted)}", _FONT)
        for place, one in enumerate(row.shown):
            title = f"{short(one.label, ' ' + one.probability)}\n{short(one.total)}"
            draw_map(canvas, left + (place + 1) * (_TILE + _BETWEEN), top, panel, row, place, title, _FONT)
        if limit is None:
            scale = f"scale ±{number(row.limit)}"
            canvas.text(left + _TILE / 2, top - panel[1] - 0.04, scale, _FONT - 0.5, va="top")
    # There is no room for words below each tile.
    notes, ends = [*rows[0].notes, made], None
    if limit is None:
        notes, ends = [*notes, "the limit of each image's own scale stands below it"], (MINUS, "+")
    draw_bar(canvas, width / 2, MARGIN + BAR, limit or 0.0, notes, ends)
    return canvas.figure
