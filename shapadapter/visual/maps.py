"""A map on a picture: its signed numbers as colors, and signs, hatching, outlines and numbers on the patches."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from PIL import Image

from shapadapter.visual.wording import MINUS

# The two hues of the SHAP plots, so that the maps look familiar.
RED = (255, 13, 87)
BLUE = (30, 136, 229)
_DARK_BLUE = "#0b2e57"  # of the dash on a patch that speaks against

# How much of the picture's contrast is left under a map: enough to find one's way, too little to compete.
_PICTURE_CONTRAST = 0.2

WORTH_A_SIGN = 0.15
"""The share of the limit from which a patch is colored enough for its sign to matter."""

# Points. A number of the smallest size is as small as print can be read; its patch has to hold six characters.
_SMALLEST, _LARGEST = 4.5, 7.5
_NUMBER_WIDTH = 3.7  # of its size

Floats = npt.NDArray[np.floating]
Bytes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]
Segment = tuple[tuple[float, float], tuple[float, float]]


# -- colors ----------------------------------------------------------------------------------------------------------


def symmetric_limit(values: npt.ArrayLike) -> float:
    """The number that gets the full color, on both sides of zero: the largest absolute value, of any shape.

    Those of all maps that are to be compared by eye belong in it.

    Raises:
        ValueError: If there is no value, or one is NaN or infinite.
    """
    array = _finite(values)
    if array.size == 0:
        raise ValueError("Expected at least one value to find a limit for.")
    return float(np.abs(array).max())


def signed_colors(values: npt.ArrayLike, limit: float) -> Bytes:
    """Color numbers (...) as RGBA (..., 4) uint8, not premultiplied: the sign gives the hue, the size the opacity.

    The absolute value `limit` is fully opaque, and above it nothing changes. With 0, all is transparent.
    """
    array = _finite(values)
    if not limit >= 0:
        raise ValueError(f"Expected a limit of at least 0, but got {limit}.")
    strength = np.clip(np.abs(array) / limit, 0, 1) if limit > 0 else np.zeros_like(array)
    colors = np.empty((*array.shape, 4), dtype=np.uint8)
    colors[..., :3] = np.where(array[..., None] > 0, RED, BLUE)  # (...) -> (..., 3)
    colors[..., 3] = np.rint(255 * strength)
    return colors


def overlay(image: npt.ArrayLike, heat: npt.ArrayLike, limit: float) -> Bytes:
    """Lay a map over a faint gray copy of its picture.

    Args:
        image: (H, W, 3) uint8 RGB.
        heat: (H, W) signed numbers, such as `Explanation.heatmap` gives.
        limit: The absolute value that gets the full color; see `symmetric_limit`.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: If the shapes do not fit, a number is NaN or infinite, or the limit is negative.
    """
    picture, heat = np.asarray(image), np.asarray(heat)
    if picture.dtype != np.uint8 or picture.shape != (*heat.shape, 3) or heat.ndim != 2:
        raise ValueError(
            "Expected an image (H, W, 3) uint8 and a map (H, W), but got "
            f"{picture.shape} {picture.dtype} and {heat.shape}."
        )
    gray = Image.fromarray(picture).convert("L")
    faint = gray.point(lambda level: 255 - _PICTURE_CONTRAST * (255 - level)).convert("RGBA")
    colors = Image.fromarray(signed_colors(heat, limit))
    return np.asarray(Image.alpha_composite(faint, colors).convert("RGB"))


def _finite(values: npt.ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("Expected finite numbers to color, but some are NaN or infinite.")
    return array


# -- marks: axes are filled by the map, (rows, cols) -------------------------------------------------------------------


def mark_signs(axes: Axes, values: Floats, limit: float) -> None:
    """Put a dash on each patch that speaks against: in gray, red and blue are alike. `limit` has the full color."""
    dashes = [((c + 0.32, r + 0.5), (c + 0.68, r + 0.5)) for r, c in np.argwhere(values < -WORTH_A_SIGN * limit)]
    _draw_lines(axes, values.shape, dashes, _DARK_BLUE, float(np.clip(0.05 * _points(axes, values.shape), 0.4, 1.2)))


def hatch(axes: Axes, chosen: Flags) -> None:
    """Draw diagonals through some patches."""
    cuts = (0.5, 1.0, 1.5) if _points(axes, chosen.shape) > 9 else (1.0,)
    lines = []
    for row, col in np.argwhere(chosen):
        for cut in cuts:  # the line x + y = cut of the unit square
            low, high = max(0.0, cut - 1), min(1.0, cut)
            lines.append(((col + low, row + cut - low), (col + high, row + cut - high)))
    _draw_lines(axes, chosen.shape, lines, "0.25", 0.5)


def outline(axes: Axes, chosen: Flags) -> None:
    """Draw the border of a set of patches."""
    framed = np.pad(chosen, 1)  # (rows + 2, cols + 2)
    beside = np.argwhere(framed[1:-1, 1:] != framed[1:-1, :-1])  # (row, col) of borders left of a column
    above = np.argwhere(framed[1:, 1:-1] != framed[:-1, 1:-1])
    lines = [((c, r), (c, r + 1)) for r, c in beside] + [((c, r), (c + 1, r)) for r, c in above]
    thin = float(np.clip(0.1 * _points(axes, chosen.shape), 0.5, 1.2))
    for color, width in (("white", 2.2 * thin), ("black", thin)):
        # The border of the map may be part of the outline.
        _draw_lines(axes, chosen.shape, lines, color, width, clip=False)


def strongest(values: Floats, share: float) -> Flags:
    """The share, rounded up, of patches with the largest numbers for or against; never one that is zero."""
    if not 0 < share < 1:
        raise ValueError(
            f"Expected contour to be a share of the patches between 0 and 1, such as 0.1, but got {share}."
        )
    size = np.abs(values).ravel()
    chosen = np.zeros(size.shape, bool)
    chosen[np.argsort(-size, kind="stable")[: math.ceil(share * size.size)]] = True
    return (chosen & (size > 0)).reshape(values.shape)


def width_for_numbers(grid: tuple[int, int], aspect: float, least: float, most: float) -> float:
    """How wide a panel, `aspect` times as high, has to be, in inches, for a number to be read in each patch."""
    rows, cols = grid
    needed = max(cols * _SMALLEST * _NUMBER_WIDTH, rows * _SMALLEST * 1.5 / aspect) / 72
    if needed > most:
        raise ValueError(
            f"Numbers in {rows} x {cols} patches would be too small to read: leave out numbers=True, and read them on "
            "the page of save_html."
        )
    return max(least, needed)


def write_numbers(axes: Axes, values: Floats, limit: float, total: float) -> None:
    """Write each patch's number on it, as `rounded` gives them."""
    height, width = _patch(axes, values.shape)
    size = min(_LARGEST, _points(axes, values.shape) / _NUMBER_WIDTH)
    for (row, col), short in np.ndenumerate(rounded(values, limit, total)):
        text = f"{short:+.{_decimals(limit)}f}".replace("-", MINUS) if short else "0"
        place = ((col + 0.5) * width - 0.5, (row + 0.5) * height - 0.5)
        axes.text(*place, text, size=size, ha="center", va="center", color="black")


def rounded(values: Floats, limit: float, total: float) -> Floats:
    """Numbers (rows, cols) as they are written, values / 10^exponent(limit), so that they add up to the printed total.

    Where rounding leaves a difference, the numbers that it changed most go the other way.
    """
    places = _decimals(limit)
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


def _decimals(limit: float) -> int:
    return 2 if limit * 10.0 ** -exponent(limit) < 10 else 1


def _patch(axes: Axes, grid: tuple[int, ...]) -> tuple[float, float]:
    """Height and width of a patch in the coordinates of the axes, which are the picture's pixels."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    return abs(bottom - top) / grid[0], abs(right - left) / grid[1]


def _points(axes: Axes, grid: tuple[int, ...]) -> float:
    """The shorter side of a patch in points."""
    box = axes.get_position()
    across, down = axes.figure.get_size_inches()  # type: ignore[union-attr]
    return 72 * min(box.width * across / grid[1], box.height * down / grid[0])


def _draw_lines(
    axes: Axes, grid: tuple[int, ...], lines: list[Segment], color: str, thickness: float, clip: bool = True
) -> None:
    """Draw lines given in patches, (column, row); the axes' first pixel has its center at 0."""
    height, width = _patch(axes, grid)
    placed = [[(col * width - 0.5, row * height - 0.5) for col, row in line] for line in lines]
    drawn = LineCollection(placed, colors=color, linewidths=thickness, capstyle="projecting", clip_on=clip)
    axes.add_collection(drawn, autolim=False)
