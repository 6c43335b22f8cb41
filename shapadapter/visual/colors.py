"""Signed numbers as colours over a picture, and how the curve of each method looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import numpy.typing as npt
from PIL import Image

# The two hues of the SHAP plots, so that the maps look familiar.
RED = (255, 13, 87)
BLUE = (30, 136, 229)

# How much of the picture's contrast is left under a map: enough to find one's way, too little to compete.
PICTURE_CONTRAST = 0.2

Floats = npt.NDArray[np.floating]
Bytes = npt.NDArray[np.uint8]


def symmetric_limit(values: npt.ArrayLike) -> float:
    """The number that gets the full colour, on both sides of zero.

    Args:
        values: Numbers of any shape, at least one: those of all maps that are to be compared by eye.

    Returns:
        The limit, not negative; 0 if all values are.

    Raises:
        ValueError: If there is no value, or one is NaN or infinite.
    """
    array = _finite(values)
    if array.size == 0:
        raise ValueError("Expected at least one value to find a limit for.")
    return float(np.abs(array).max())


def signed_colors(values: npt.ArrayLike, limit: float) -> Bytes:
    """Colour signed numbers: the sign gives the hue, the size the opacity.

    Args:
        values: (...) numbers.
        limit: The absolute value that is fully opaque, and above which nothing changes. With 0, all is transparent.

    Returns:
        (..., 4) uint8 RGBA, not premultiplied.

    Raises:
        ValueError: If a value is NaN or infinite, or the limit is negative.
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
    """Lay a map over a faint grey copy of its picture.

    Args:
        image: (H, W, 3) uint8 RGB.
        heat: (H, W) signed numbers, such as `Explanation.heatmap` gives.
        limit: The absolute value that gets the full colour; see `symmetric_limit`.

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
    grey = Image.fromarray(picture).convert("L")
    faint = grey.point(lambda level: 255 - PICTURE_CONTRAST * (255 - level)).convert("RGBA")
    colors = Image.fromarray(signed_colors(heat, limit))
    return np.asarray(Image.alpha_composite(faint, colors).convert("RGB"))


def _finite(values: npt.ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("Expected finite numbers to colour, but some are NaN or infinite.")
    return array


Dashes = tuple[float, ...]


@dataclass(frozen=True)
class Style:
    """A colour such as `#ff0d57`, and lengths of dashes and gaps in widths of the line, none for a solid one."""

    colour: str
    dashes: Dashes


FIRST = "#{:02x}{:02x}{:02x}".format(*RED)
_KNOWN = {
    "shapadapter": Style(FIRST, ()),
    "random": Style("#737373", (3.7, 1.6)),
    "centre": Style("#b3b3b3", (2, 3)),
}
# Okabe and Ito's colours for readers who see few, without those near the red, and without yellow and black: the one
# cannot be seen on a white page, the other not on a dark one.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#56b4e9", "#cc79a7")
_DASHES: tuple[Dashes, ...] = ((6.4, 1.6, 1, 1.6), (1, 1.65), (7, 1.5), (4, 1, 1, 1, 1, 1))


def styles(methods: Sequence[str]) -> dict[str, Style]:
    """Give each method colour and dashes; dashes differ, too, for prints in grey.

    Args:
        methods: In the order in which they are listed.

    Returns:
        A style by method. Those that know nothing of the model are grey.
    """
    # Of 5 colours and 4 dashes, each with its neighbour, 20 methods differ.
    others = map(Style, cycle(_COLOURS), cycle(_DASHES))
    return {name: _KNOWN.get(name) or next(others) for name in methods}
