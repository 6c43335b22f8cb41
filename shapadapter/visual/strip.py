"""An image beside its maps as one small picture, with nothing but Pillow and numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from shapadapter.exchange import Box
from shapadapter.explanation import Explanation

from .fonts import Font, writable
from .maps import Floats, symmetric_limit
from .marks import DARK_BLUE, DASH, speaks_against
from .originals import lay, picture_of
from .wording import MINUS, Column, columns, one_line

HEIGHT = 184
"""Of image and maps, in pixels: four of them beside each other are as wide as a page of the Hub."""

_GAP = 8
_LINES = 2
_SIZE = 15
_INK, _FAINT = (31, 41, 55), (107, 114, 128)


def draw_strip(
    explanation: Explanation,
    index: int = 0,
    *,
    max_classes: int = 3,
    caption: str = "",
    height: int = HEIGHT,
    original: Any | None = None,
) -> Image.Image:
    """Draw one image, and beside it the maps of its likeliest shown classes, which share their colours.

    Patches that speak against a class bear a dash, so that a print in grey can be read.

    Args:
        explanation: any explanation.
        index: which image.
        max_classes: how many maps at most.
        caption: a line below the image, such as what it shows.
        height: of image and maps, in pixels.
        original: the image as it was given to `explain`, to draw the maps on; None draws them on what the model saw.

    Returns:
        An RGB picture.

    Raises:
        ValueError: a number is not finite, or the frame of the original is not known.
        IndexError: there is no such image.
    """
    shown = columns(explanation, index, max_classes=max_classes)
    whole, box = picture_of(explanation[index], original)
    tall, wide = whole.shape[:2]
    width = max(height // 3, min(3 * height, round(height * wide / tall)))
    picture = Image.fromarray(whole).resize((width, height), Image.Resampling.BICUBIC)
    top, left, bottom, right = (side * part for side, part in zip(box, 2 * (height / tall, width / wide), strict=True))
    limit = symmetric_limit(np.stack([column.values.numpy() for column in shown]))
    tiles = [picture, *(_map(picture, column, (top, left, bottom, right), limit) for column in shown)]
    texts = [(caption, ""), *(_texts(column) for column in shown)]
    below = _LINES * (_SIZE + 5) + _GAP
    strip = Image.new("RGB", (len(tiles) * (width + _GAP) + _GAP, height + 2 * _GAP + below), "white")
    pen = ImageDraw.Draw(strip)
    for place, (tile, lines) in enumerate(zip(tiles, texts, strict=True)):
        left = _GAP + place * (width + _GAP)
        strip.paste(tile, (left, _GAP))
        for line, text in enumerate(lines):
            top = height + 2 * _GAP + line * (_SIZE + 5) - 2
            words, font = writable(one_line(text).replace(MINUS, "-"), _SIZE)
            pen.text((left, top), _fitting(words, font, width), font=font, fill=_FAINT if line else _INK)
    return strip


def describe(explanation: Explanation, index: int = 0, *, max_classes: int = 3, caption: str = "") -> str:
    """The same in words, for those who do not see the picture."""
    shown = "; ".join(" ".join(_texts(column)) for column in columns(explanation, index, max_classes=max_classes))
    return f"Attribution maps of an image{f' ({caption})' if caption else ''}: {shown}"


def _map(picture: Image.Image, column: Column, box: Box, limit: float) -> Image.Image:
    values = column.values.numpy()
    drawn = Image.fromarray(lay(np.asarray(picture), values, box, limit))
    _mark(drawn, values, box, limit)
    return drawn


def _mark(drawn: Image.Image, values: Floats, box: Box, limit: float) -> None:
    """Put the dash of the figures on each patch that speaks against: values (rows, cols)."""
    above, beside, bottom, end = box
    height, width = (bottom - above) / values.shape[0], (end - beside) / values.shape[1]
    thick = max(1, round(0.08 * min(height, width)))
    pen = ImageDraw.Draw(drawn)
    for row, col in np.argwhere(speaks_against(values, limit)):
        left, right = (round(beside + (col + part) * width) for part in DASH)
        top = round(above + (row + 0.5) * height - thick / 2)
        pen.rectangle((left, top, max(left, right - 1), top + thick - 1), fill=DARK_BLUE)


def _texts(column: Column) -> tuple[str, str]:
    return column.label, f"{column.probability}, sum {column.sum}"


def _fitting(line: str, font: Font, width: int) -> str:
    """The line, cut where it would run into the next map."""
    cut = line[:200]
    while cut and font.getlength(cut if cut == line else f"{cut}…") > width:
        cut = cut[:-1]
    return cut if cut == line else f"{cut}…"
