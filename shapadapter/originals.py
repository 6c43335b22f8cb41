"""Maps in the frame of the original image, of which the model may have seen a part."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.nn.functional import grid_sample

if TYPE_CHECKING:
    from .explanation import Explanation

Size = tuple[int, int]
Box = tuple[float, float, float, float]
"""Top, left, bottom and right."""


def original_frame(one: Explanation) -> tuple[Size, Box]:
    """Height and width of the original of one image, and where on it that lies which the model saw, in its pixels.

    Raises:
        ValueError: that is not known.
    """
    if one.frames is None:
        raise ValueError("The original image is not known: explain it with an image processor, instead of prepared.")
    height, width, top, left, bottom, right = one.frames[0].tolist()
    if not (height >= 1 and width >= 1 and bottom > top and right > left):  # or NaN
        raise ValueError(
            "It is not known where the original image was seen: its processor does more than resize, crop and pad."
        )
    return (int(height), int(width)), (top, left, bottom, right)


def laid_out(values: ArrayLike, size: Size, box: Box, smooth: bool = False) -> NDArray[np.float32]:
    """A map on an image of which it covers a part.

    Args:
        values: (rows, cols).
        size: height and width of the image.
        box: of the map, in pixels of the image.
        smooth: interpolate bicubically.

    Returns:
        (H, W) float32, NaN outside the box.
    """
    down, across = (
        (torch.arange(count, dtype=torch.float64) + 0.5 - start) / (end - start)
        for count, start, end in zip(size, box[:2], box[2:], strict=True)
    )  # (H,) and (W,), in 0..1 inside the box
    places = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1)  # (H, W, 2)
    given = torch.as_tensor(values, dtype=torch.float64)[None, None]  # (1, 1, rows, cols)
    mode = "bicubic" if smooth else "nearest"
    found = grid_sample(given, 2 * places[None] - 1, mode, "border", align_corners=False)[0, 0]  # (H, W)
    return found.where(((places >= 0) & (places < 1)).all(-1), torch.nan).float().numpy()
