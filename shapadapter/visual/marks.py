"""What is drawn over the patches of a map: signs, hatching, outlines and numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shapadapter.visual.colors import Floats
from shapadapter.visual.wording import MINUS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


Flags = npt.NDArray[np.bool_]
Segment = tuple[tuple[float, float], tuple[float, float]]

WORTH_A_SIGN = 0.15
"""The share of the limit from which a patch is coloured enough for its sign to matter."""
DARK_BLUE = "#0b2e57"
"""Of the dash on a patch that speaks against."""
DASH = (0.32, 0.68)
"""Where in the patch it begins and ends."""
# Points. A number of this size is as small as print can be read; its cell has to hold six characters.
_SMALLEST, _LARGEST = 4.5, 7.5
_WIDTH_OF_NUMBER = 3.7  # of its size


def mark_signs(axes: Axes, values: Floats, limit: float) -> None:
    """Put a dash on each patch that speaks against: in grey, red and blue are alike.

    Args:
        axes: With the map on them, which fills them.
        values: (rows, cols).
        limit: The number with the full colour.
    """
    height, width = _patch(axes, values)
    start, end = DASH
    lines = [
        _line((c + start, r + 0.5), (c + end, r + 0.5), height, width)
        for r, c in np.argwhere(speaks_against(values, limit))
    ]
    _draw_lines(axes, lines, DARK_BLUE, float(np.clip(0.05 * _points(axes, values), 0.4, 1.2)))


def speaks_against(values: Floats, limit: float) -> Flags:
    """The patches that bear a dash: (rows, cols) bool of values (rows, cols), with `limit` the number of full colour."""
    return values < -WORTH_A_SIGN * limit


def hatch(axes: Axes, chosen: Flags) -> None:
    """Draw diagonals through some patches: (rows, cols) bool."""
    height, width = _patch(axes, chosen)
    cuts = (0.5, 1.0, 1.5) if _points(axes, chosen) > 9 else (1.0,)
    lines = []
    for row, col in np.argwhere(chosen):
        for cut in cuts:  # the line x + y = cut of the unit square
            low, high = max(0.0, cut - 1), min(1.0, cut)
            lines.append(_line((col + low, row + cut - low), (col + high, row + cut - high), height, width))
    _draw_lines(axes, lines, "0.25", 0.5)


def outline(axes: Axes, chosen: Flags) -> None:
    """Draw the border of a set of patches: (rows, cols) bool."""
    height, width = _patch(axes, chosen)
    framed = np.pad(chosen, 1)  # (rows + 2, cols + 2)
    beside = np.argwhere(framed[1:-1, 1:] != framed[1:-1, :-1])  # (row, col) of borders left of a column
    below = np.argwhere(framed[1:, 1:-1] != framed[:-1, 1:-1])  # above a row
    lines = [_line((c, r), (c, r + 1), height, width) for r, c in beside]
    lines += [_line((c, r), (c + 1, r), height, width) for r, c in below]
    thin = float(np.clip(0.1 * _points(axes, chosen), 0.5, 1.2))
    for colour, line in (("white", 2.2 * thin), ("black", thin)):
        # The border of the map may be part of the outline.
        _draw_lines(axes, lines, colour, line, clip=False)


def strongest(values: Floats, share: float) -> Flags:
    """The share of patches with the largest numbers, for or against; never one that is zero.

    Args:
        values: (rows, cols).
        share: Between 0 and 1; rounded up to whole patches.

    Returns:
        (rows, cols) bool.

    Raises:
        ValueError: If the share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(
            f"Expected contour to be a share of the patches between 0 and 1, such as 0.1, but got {share}."
        )
    size = np.abs(values).ravel()
    chosen = np.zeros(size.shape, bool)
    chosen[np.argsort(-size, kind="stable")[: math.ceil(share * size.size)]] = True
    return (chosen & (size > 0)).reshape(values.shape)


def panel_for_numbers(grid: tuple[int, int], aspect: float, panel: float, largest: float) -> float:
    """How wide a panel has to be, in inches, for a number to be read in each patch.

    Args:
        grid: rows, cols.
        aspect: Height of the panel over its width.
        panel: The width it has at least.
        largest: And at most.

    Raises:
        ValueError: If there are too many patches.
    """
    rows, cols = grid
    needed = max(cols * _SMALLEST * _WIDTH_OF_NUMBER, rows * _SMALLEST * 1.5 / aspect) / 72
    if needed > largest:
        raise ValueError(
            f"Numbers in {rows} x {cols} patches would be too small to read: leave out numbers=True, and read them on "
            "the page of save_html."
        )
    return max(panel, needed)


def write_numbers(axes: Axes, values: Floats, limit: float, total: float) -> None:
    """Write each patch's number on it, as `rounded` gives them: values (rows, cols)."""
    height, width = _patch(axes, values)
    size = min(_LARGEST, _points(axes, values) / _WIDTH_OF_NUMBER)
    places = 2 if limit * 10.0 ** -exponent(limit) < 10 else 1
    for (row, col), short in np.ndenumerate(rounded(values, limit, total)):
        text = f"{short:+.{places}f}".replace("-", MINUS) if short else "0"
        place = ((col + 0.5) * width - 0.5, (row + 0.5) * height - 0.5)
        axes.text(*place, text, size=size, ha="center", va="center", color="black")


def rounded(values: Floats, limit: float, total: float) -> Floats:
    """Numbers as they are written, values / 10^exponent(limit), so that they give the printed total to the digit.

    Where rounding leaves a difference, the numbers that it changed most go the other way.

    Args:
        values: (rows, cols).
        limit: The largest of them, for or against.
        total: Their sum as it is printed.

    Returns:
        (rows, cols).
    """
    places = 2 if limit * 10.0 ** -exponent(limit) < 10 else 1
    exact = values.astype(np.float64) / 10.0 ** (exponent(limit) - places)  # in units of the last digit
    units = np.rint(exact)
    aim = total / 10.0 ** (exponent(limit) - places)
    if abs(aim - exact.sum()) > 1:  # printed with fewer digits than the numbers
        aim = exact.sum()
    missing = round(aim) - int(units.sum())
    order = np.argsort(np.sign(missing) * (units - exact), axis=None, kind="stable")
    units.flat[order[: abs(missing)]] += np.sign(missing)
    return units / 10**places


def exponent(limit: float) -> int:
    """The power of ten that numbers up to `limit` are written in, so that two or three digits say something."""
    return 0 if limit == 0 or 0.1 <= limit < 100 else math.floor(math.log10(limit))


def _patch(axes: Axes, values: Floats | Flags) -> tuple[float, float]:
    """Height and width of a patch in the coordinates of the axes, which are the picture's pixels."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    return abs(bottom - top) / values.shape[0], abs(right - left) / values.shape[1]


def _points(axes: Axes, values: Floats | Flags) -> float:
    """The shorter side of a patch in points."""
    box = axes.get_position()
    across, down = axes.figure.get_size_inches()  # type: ignore[union-attr]
    return 72 * min(box.width * across / values.shape[1], box.height * down / values.shape[0])


def _line(start: tuple[float, float], end: tuple[float, float], height: float, width: float) -> Segment:
    """A line from patch coordinates (column, row) to pixels, whose first has its centre at 0."""
    (a, b), (c, d) = start, end
    return ((a * width - 0.5, b * height - 0.5), (c * width - 0.5, d * height - 0.5))


def _draw_lines(axes: Axes, lines: list[Segment], colour: str, width: float, *, clip: bool = True) -> None:
    from matplotlib.collections import LineCollection

    drawn = LineCollection(lines, colors=colour, linewidths=width, capstyle="projecting", clip_on=clip)
    axes.add_collection(drawn, autolim=False)
