"""The picture that maps are drawn on: what the model saw, or the original with what it saw of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from shapadapter.arrays import eight_bits
from shapadapter.exchange import Box, frame_of, laid_out
from shapadapter.explanation import Explanation
from shapadapter.frames import unseen
from shapadapter.images import open_image

from .maps import Bytes, Floats, overlay

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
