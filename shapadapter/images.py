"""Images as people have them: files, PIL images, arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import ImageError


def open_image(image: Any) -> Any:
    """A path or PIL image as an upright RGB image; arrays and tensors pass if they hold 1 or 3 channels.

    Photographs are turned as their EXIF data say, as `datasets` does.

    Raises:
        ImageError: missing or unreadable file, wrong channel count, or no image at all.
    """
    if isinstance(image, Tensor | np.ndarray):
        channels = {image.shape[0], image.shape[-1]} if image.ndim == 3 else {1} if image.ndim == 2 else set()
        if not channels & {1, 3}:
            raise ImageError(f"Expected an image (H, W, 3) or (3, H, W), got an array of shape {tuple(image.shape)}.")
        return image
    try:
        if isinstance(image, Image.Image):
            return _upright(image)
        if isinstance(image, str) or hasattr(image, "__fspath__"):
            with Image.open(image) as file:
                return _upright(file)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"Cannot read image {image!r}: {error}") from error
    raise ImageError(f"Expected a PIL image, a path, an array or a tensor, got {type(image).__name__}.")


def _upright(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        raise ImageError(
            f"Image mode {image.mode!r} has more than 8 bits a channel, which RGB would cut off; rescale it."
        )
    return ImageOps.exif_transpose(image).convert("RGB")


def prepare_images(images: list[Any], processor: Any) -> Tensor:
    """Run an image processor: pixel values (B, C, H, W).

    Raises:
        ImageError: an image cannot be opened, or the processor cannot take it.
    """
    opened = [open_image(image) for image in images]
    try:
        return processor(opened, return_tensors="pt")["pixel_values"]
    except (ValueError, TypeError, RuntimeError) as error:
        raise ImageError(f"{type(processor).__name__} cannot prepare the images: {error}") from error
