"""Sample pictures for a model card: an image beside its maps as one small picture."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shapadapter.explanation.convert import Box
from shapadapter.explanation.explanation import Explanation
from shapadapter.visual.colors import Floats, symmetric_limit
from shapadapter.visual.marks import DARK_BLUE, DASH, speaks_against
from shapadapter.visual.rows import lay, picture_of
from shapadapter.visual.wording import MINUS, Column, columns, one_line

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Pillow's own font has no letters but those of English. These come with Linux, Windows and macOS.
_INSTALLED = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "arial.ttf",
    "Arial Unicode.ttf",
    "msyh.ttc",
)


def writable(text: str, size: int) -> tuple[str, Font]:
    """The text and a font that can write it: Pillow's own if it can, else one that is installed.

    If none can, accents go, and what then is missing becomes a question mark: that is told from a letter, a box is not.

    Args:
        text: one line.
        size: of the font, in pixels.
    """
    own = ImageFont.load_default(size=size)
    for font in (own, *_installed(size)):
        if not _missing(text, font):
            return text, font
    bare = "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))
    unknown = _missing(bare, own)
    return "".join("?" if char in unknown else char for char in bare), own


def _installed(size: int) -> Iterator[Font]:
    for name in _INSTALLED:
        with suppress(OSError):
            yield ImageFont.truetype(name, size)


def _missing(text: str, font: Font) -> set[str]:
    """The characters that the font draws as it draws what is no character."""
    box = font.getmask("\uffff")
    drawn = {char: font.getmask(char) for char in set(text) if not char.isspace()}
    return {char for char, mask in drawn.items() if (mask.size, bytes(mask)) == (box.size, bytes(box))}


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


def sample_pictures(
    explanation: Explanation, max_classes: int, labels: Sequence[int] | None = None
) -> tuple[dict[str, bytes], list[dict[str, str]]]:
    """Draw every image of an explanation.

    Args:
        explanation: of the images to be shown.
        max_classes: maps beside each image.
        labels: the class of each image, None if unknown.

    Returns:
        Contents of png files by name, and for the card's record `file` and `alt` of each.
    """
    files, listed = {}, []
    for index in range(len(explanation)):
        name = f"explanation-{index + 1}.png"
        known = labels is not None and 0 <= labels[index] < len(explanation.labels)
        caption = f"labelled {explanation.labels[labels[index]]}" if labels is not None and known else ""
        options = {"max_classes": max_classes, "caption": caption}
        file = io.BytesIO()
        draw_strip(explanation, index, **options).save(file, format="png", optimize=True)  # type: ignore[arg-type]
        files[name] = file.getvalue()
        listed.append({"file": name, "alt": describe(explanation, index, **options)})  # type: ignore[arg-type]
    return files, listed
