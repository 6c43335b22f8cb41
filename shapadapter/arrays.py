"""Arrays and tensors as images of 8 bits a channel: which axis is which, and which number is white."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .errors import ImageError


def from_array(image: Any) -> Any:
    """An array or tensor (H, W), (H, W, C) or (C, H, W) of 1 or 3 channels as an RGB image.

    Where the shape leaves two ways to read it, arrays have their channels last and tensors first.

    Returns:
        A PIL image; of floats an array (H, W, 3) float32, for only with a processor can be told what range is right.

    Raises:
        ImageError: wrong channel count or range.
    """
    pixels = _as_numpy(image)
    given = tuple(pixels.shape)
    axes = (0, -1) if isinstance(image, Tensor) else (-1, 0)
    if pixels.ndim == 3:
        found = [axis for count in (3, 1) for axis in axes if given[axis] == count]
        pixels = np.moveaxis(pixels, found[0], -1) if found else pixels  # (C, H, W) -> (H, W, C)
    pixels = np.atleast_3d(pixels)  # (H, W, C)
    if len(given) not in (2, 3) or pixels.shape[-1] not in (1, 3) or not pixels.size:
        four = " If the fourth channel is transparency, pass PIL.Image.fromarray(image)." if 4 in given else ""
        raise ImageError(f"Expected an image (H, W, 3) or (3, H, W), got an array of shape {given}.{four}")
    pixels = pixels if pixels.dtype.kind == "f" else eight_bits(pixels)
    whole = np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))  # (H, W, 3)
    return whole if whole.dtype.kind == "f" else Image.fromarray(whole)


def _as_numpy(image: Any) -> NDArray[Any]:
    """Numbers as an array on the CPU.

    Raises:
        ImageError: they are none, or some are masked.
    """
    if np.ma.is_masked(image):
        raise ImageError(
            "Expected an image without masked pixels: say which color they have, such as image.filled(255)."
        )
    try:
        if isinstance(image, Tensor):
            image = image.detach().cpu()
            image = (image.float() if image.is_floating_point() else image).numpy()
        pixels = np.asarray(image)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ImageError(f"Cannot read {type(image).__name__} as an image: {error}") from error
    if pixels.dtype.kind not in "buif":
        raise ImageError(f"Expected an image of numbers from 0 to 255, got an array of {pixels.dtype}.")
    return pixels.astype(np.float32) if pixels.dtype.kind == "f" else pixels


def eight_bits(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Pixels (H, W, C) or (H, W) in 8 bits: from 0 to 255, grey ones of uint16 from 0 to 65,535, bool as black and white.

    Raises:
        ImageError: the range leaves open what is white.
    """
    if pixels.dtype == np.uint8 and pixels.max() != 1:
        return pixels
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    low, high = pixels.min(), pixels.max()
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all():
            raise ImageError("Expected images from 0 to 255, some numbers of this one are NaN or infinite.")
        # Divided by a processor's deviations, white is at most about 5, and hardly a whole number.
        if low < 0 or 0 < high <= 1 or (high <= 5 and (pixels != np.rint(pixels)).any()):
            raise ImageError(
                f"Expected images from 0 to 255, got floats from {low:.2f} to {high:.2f}, which the image processor would "
                "divide by 255: what is prepared for the model goes without a processor, in a data set in a column "
                "pixel_values; where 1 is white, pass (255 * image).round() as uint8."
            )
    elif (pixels.dtype.kind, pixels.dtype.itemsize, pixels.shape[-1]) == ("u", 2, 1):
        if 0 < high <= 255:
            raise ImageError(
                f"Expected grey in 16 bits from 0 to 65,535, got {pixels.dtype} up to {high}: where white is 255, pass "
                "image.astype(np.uint8); where it is 65,535, pass (image / 257).astype(np.uint8)."
            )
        return from_sixteen_bits(pixels)
    if low < 0 or high > 255 or (high == 1 and pixels.dtype.kind != "f"):
        raise ImageError(
            f"Expected images from 0 to 255, got {pixels.dtype} from {low} to {high}: pass (image * (255 / white)).round() as "
            "uint8, where white is the number that means white."
        )
    return np.rint(pixels).astype(np.uint8)


def from_sixteen_bits(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """From 0..65,535 to 0..255."""
    return np.rint(pixels.astype(np.float64) / 257).clip(0, 255).astype(np.uint8)
