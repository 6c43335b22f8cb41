"""A sheet for pictures and maps, measured in inches so that nothing overlaps at any image size."""

from __future__ import annotations

import unicodedata
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font, get_font_names
from matplotlib.textpath import TextToPath

from shapadapter.core.files import atomic_file
from shapadapter.visual.maps import Bytes, mark_signs, signed_colors
from shapadapter.visual.wording import number

# Lengths in inches, text sizes in points.
PANEL, GAP, MARGIN = 2.3, 0.25, 0.2
TITLE, LINE, BAR = 0.42, 0.12, 0.62
LARGE, SMALL = 9.0, 7.5
POINT = 1 / 72
_BAR_WIDTH, _BAR_HEIGHT = 1.3, 0.1

_METADATA_FIELDS = {"png": "Description", "svg": "Description", "pdf": "Subject"}

# Matplotlib's own font has no glyphs of these scripts; the first installed one of each is asked for them.
_MORE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Microsoft YaHei", "Hiragino Sans", "Noto Sans Devanagari")


class DescribedFigure(Figure):
    """A figure with an `alt_text`, which `savefig` writes into PNG, SVG and PDF files.

    Screen readers do not read it there; whoever puts the picture on a page finds it.

    Attributes:
        alt_text: What the figure shows, in words; nothing is written if it is empty.
    """

    alt_text: str = ""

    def savefig(self, fname: Any, *, transparent: bool | None = None, **kwargs: Any) -> None:
        """As matplotlib's own; `metadata` given here wins over the description. A file is never seen half-written."""
        named = Path(fname).suffix[1:] if isinstance(fname, str | PathLike) else ""
        kind = str(kwargs.get("format") or named or rcParams["savefig.format"]).lower()
        if self.alt_text and kind in _METADATA_FIELDS:
            kwargs["metadata"] = {_METADATA_FIELDS[kind]: self.alt_text, **(kwargs.get("metadata") or {})}
        if not isinstance(fname, str | PathLike):
            super().savefig(fname, transparent=transparent, **kwargs)
            return
        path = Path(fname) if named or kwargs.get("format") else Path(f"{fspath(fname)}.{kind}")  # as matplotlib does
        with atomic_file(path) as temporary:
            super().savefig(temporary, transparent=transparent, **{**kwargs, "format": kind})


def new_figure(**options: Any) -> DescribedFigure:
    """A white figure that belongs to no window."""
    return DescribedFigure(**{"dpi": 150, "facecolor": "white", **options})


@dataclass(frozen=True)
class Canvas:
    """A figure that is drawn on in inches from its lower left corner."""

    figure: DescribedFigure
    across: float
    down: float

    def axes(self, left: float, bottom: float, width: float, height: float) -> Axes:
        """Axes without ticks in a box."""
        box = (left / self.across, bottom / self.down, width / self.across, height / self.down)
        return self.figure.add_axes(box, xticks=[], yticks=[])

    def text(self, x: float, y: float, text: str, size: float, **style: Any) -> None:
        """Words at a place, centered unless the style says otherwise."""
        style = {"ha": "center", "va": "center", "color": "black", "family": _families(), **style}
        # Class names are not mathematics, whatever dollar signs they hold.
        self.figure.text(x / self.across, y / self.down, _writable(text), size=size, parse_math=False, **style)


def new_canvas(across: float, down: float, **options: Any) -> Canvas:
    """An empty sheet, in inches."""
    return Canvas(new_figure(figsize=(across, down), **options), across, down)


def draw_panel(
    canvas: Canvas, left: float, top: float, size: tuple[float, float], pixels: Bytes, title: str, font: float = LARGE
) -> Axes:
    """Draw pixels (H, W, 3) in a box of width and height below an upper left corner, and a title above it."""
    axes = canvas.axes(left, top - size[1], *size)
    axes.imshow(pixels, aspect="auto", interpolation="nearest")
    axes.spines[:].set(color="0.7", linewidth=0.5)
    canvas.text(left + size[0] / 2, top + 0.06, title, font, va="bottom")
    return axes


def draw_scale(
    canvas: Canvas, middle: float, top: float, colors: Bytes, ticks: Mapping[float, str], notes: Sequence[str]
) -> Axes:
    """Draw a bar of colors (1, n, 3 or 4) around `middle`, below it what stands at shares of its width, and notes."""
    left, bottom = middle - _BAR_WIDTH / 2, top - _BAR_HEIGHT - 0.08
    axes = canvas.axes(left, bottom, _BAR_WIDTH, _BAR_HEIGHT)
    axes.imshow(colors, aspect="auto")
    axes.spines[:].set(color="0.7", linewidth=0.5)
    for share, text in ticks.items():
        canvas.text(left + share * _BAR_WIDTH, bottom - 0.04, text, SMALL, va="top")
    canvas.text(middle, bottom - 0.19, "\n".join(notes), SMALL, va="top")
    return axes


def draw_bar(
    canvas: Canvas,
    middle: float,
    top: float,
    limit: float,
    notes: Sequence[str],
    ends: tuple[str, str] | None = None,
) -> None:
    """Draw the color scale of maps, symmetric about zero; `ends` stand there instead of the limits."""
    low, high = ends or ((number(-limit), number(limit, sign=True)) if limit else ("0", "0"))
    colors = signed_colors(np.linspace(-1, 1, 255)[None], 1.0)  # (1, 255, 4)
    axes = draw_scale(canvas, middle, top, colors, {0: low, 0.5: "0", 1: high}, notes)
    mark_signs(axes, np.array([[-1.0, 0, 0, 0, 0, 0]]), 1.0)
    height = top - _BAR_HEIGHT / 2 - 0.08
    canvas.text(middle - _BAR_WIDTH / 2 - 0.08, height, "against", SMALL, ha="right")
    canvas.text(middle + _BAR_WIDTH / 2 + 0.08, height, "for", SMALL, ha="left")


# -- words -----------------------------------------------------------------------------------------------------------


def fit(name: str, rest: str = "", *, width: float = PANEL, size: float = LARGE) -> str:
    """Shorten a name until it and the rest of its line are no wider than `width` inches."""
    measure, font = TextToPath(), FontProperties(size=size, family=_families())

    def fits(count: int) -> bool:
        """Whether so many letters of the name leave room for the rest."""
        line = _writable(_line(name, name[:count], rest))
        return bool(measure.get_text_width_height_descent(line, font, False)[0] <= width / POINT)

    longest = min(len(name), 200)
    # Measuring is slow, so the longest that fits is found by halving.
    kept = longest if fits(longest) else bisect_left(range(longest), True, key=lambda count: not fits(count)) - 1
    return _line(name, name[: max(kept, 0)], rest)


def _line(name: str, kept: str, rest: str) -> str:
    shown = kept if kept == name else kept.rstrip() + "…"
    # A name written from right to left keeps its direction to itself, or the numbers behind it change sides.
    turns = any(unicodedata.bidirectional(sign) in ("R", "AL") for sign in shown)
    return (f"\N{FIRST STRONG ISOLATE}{shown}\N{POP DIRECTIONAL ISOLATE}" if turns and rest else shown) + rest


def _writable(text: str) -> str:
    """The text with a question mark for each letter that no font has: that is told from a letter, a box is not."""
    return "".join(
        sign if ord(sign) in _letters() or unicodedata.category(sign) == "Cf" or sign.isspace() else "?"
        for sign in text
    )


@cache
def _letters() -> frozenset[int]:
    return frozenset[int]().union(*(get_font(findfont(name)).get_charmap() for name in _families()))


@cache
def _families() -> list[str]:
    """Matplotlib's font, then those installed for scripts that it lacks."""
    installed = set(get_font_names())
    return ["DejaVu Sans", *(name for name in _MORE_FONTS if name in installed)]
