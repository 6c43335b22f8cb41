"""Images as people have them: files, PIL images, arrays."""

from __future__ import annotations

import errno
import io
import math
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import ImageError, UnreadableImageError

IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
"""What image processors make for vision models."""

DECODING_ERRORS = (OSError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow and the file system raise for an image that cannot be read."""


def open_image(image: Any) -> Any:
    """A path, a file's content or a PIL image as an upright RGB image; arrays and tensors pass if they hold 1 or 3 channels.

    A file's content is `bytes`, or the `{"bytes": ..., "path": ...}` in which `datasets` keeps it. Photographs are turned
    as their EXIF data say, as `datasets` does.

    Raises:
        UnreadableImageError: missing or unreadable file.
        ImageError: wrong channel count, or no image at all.
    """
    if isinstance(image, Tensor | np.ndarray):
        channels = {image.shape[0], image.shape[-1]} if image.ndim == 3 else {1} if image.ndim == 2 else set()
        if not channels & {1, 3}:
            raise ImageError(f"Expected an image (H, W, 3) or (3, H, W), got an array of shape {tuple(image.shape)}.")
        return image
    try:
        content = _content(image)
        if isinstance(content, Image.Image):
            return _upright(content)
        if isinstance(content, str | io.BytesIO) or hasattr(content, "__fspath__"):
            with Image.open(content) as file:
                return _upright(file)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(
            f"Cannot read image {_name(image)}, which unpacks to too much: {error} If it comes from where you trust it, set "
            "PIL.Image.MAX_IMAGE_PIXELS to a larger number first."
        ) from error
    except (*DECODING_ERRORS, ValueError) as error:  # Pillow raises the latter for texts that unpack to too much
        kind = UnreadableImageError if is_damage(error) else ImageError
        raise kind(f"Cannot read image {_name(image)}: {_reason(error)}") from error
    if content is None:
        raise UnreadableImageError("There is no image.")
    raise ImageError(f"Expected a PIL image, a path, an array or a tensor, got {type(image).__name__}.")


def is_damage(error: Exception) -> bool:
    """Whether one of `DECODING_ERRORS` lies with the image, not with a disk, a network or too many open files."""
    elsewhere = isinstance(error, ConnectionError | TimeoutError)
    return not elsewhere and getattr(error, "errno", None) in (None, errno.ENOENT)


def _content(image: Any) -> Any:
    """What can be opened of what people and `datasets` call an image."""
    if isinstance(image, bytes):
        return io.BytesIO(image)
    if not isinstance(image, Mapping) or not {"bytes", "path"} <= image.keys():
        return image
    if image["bytes"] is not None:
        return io.BytesIO(image["bytes"])
    if "://" in (image["path"] or ""):
        from datasets import Image as Feature  # a stream's file on a server, whose address it has made up

        return Feature().decode_example(dict(image))
    return image["path"]


def _name(image: Any) -> str:
    if isinstance(image, bytes):
        return f"of {len(image)} bytes"
    name = image["path"] if isinstance(image, Mapping) else getattr(image, "filename", None) or image
    return _short(repr(os.fspath(name) if isinstance(name, os.PathLike) else name))


def _reason(error: Exception) -> str:
    """What went wrong, without the file's name, which stands before it."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image, or of a format that Pillow does not know"
    return _short(getattr(error, "strerror", None) or str(error))


def _short(text: str) -> str:
    """A text cut off where it is no path, but a whole image in letters."""
    return text if len(text) <= 300 else f"{text[:300]}..."


def undecoded(dataset: Any) -> Any:
    """A stream of `datasets` that leaves files as they are, to be opened by `open_image`; anything else as it is.

    A stream that meets a damaged file while it decodes ends there.
    """
    features = getattr(dataset, "features", None)
    if hasattr(dataset, "__len__") or not isinstance(features, Mapping) or not hasattr(dataset, "cast_column"):
        return dataset
    for column, feature in features.items():
        # Another mode than RGB is the user's wish, which only the feature knows.
        if getattr(feature, "decode", False) and getattr(feature, "mode", "") in (None, "RGB"):
            dataset = dataset.cast_column(column, replace(feature, decode=False))
    return dataset


def _upright(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        raise ImageError(
            f"Image mode {image.mode!r} has more than 8 bits a channel, which RGB would cut off; rescale it."
        )
    return ImageOps.exif_transpose(image).convert("RGB")


def prepare_images(images: list[Any], processor: Any) -> dict[str, Tensor]:
    """Run an image processor, or the image side of a processor of images and texts.

    Returns:
        `pixel_values` (B, C, H, W), and what else the processor makes for the model; where it cuts images in patches
        (B, N, 3 * p * p), `pixel_attention_mask` and `spatial_shapes`.

    Raises:
        ImageError: an image cannot be opened, the processor cannot take it, or the images come out in several sizes.
    """
    return prepare_opened([open_image(image) for image in images], processor)


def prepare_opened(opened: list[Any], processor: Any) -> dict[str, Tensor]:
    """`prepare_images` of what `open_image` has returned."""
    processor = image_side(processor)
    try:
        prepared = processor(opened, return_tensors="pt")
    except (ValueError, TypeError, RuntimeError) as error:
        sizes = sorted({tuple(image.size) for image in opened if isinstance(image, Image.Image)})
        several = (
            f" They have {len(sizes)} sizes: resize them to one, or send them one by one." if len(sizes) > 1 else ""
        )
        raise ImageError(f"{type(processor).__name__} cannot prepare the images: {error}{several}") from error
    return {name: prepared[name] for name in IMAGE_INPUTS if name in prepared}


def image_side(processor: Any) -> Any:
    """The image processor inside a processor of images and texts; any other as it is."""
    return getattr(processor, "image_processor", None) or processor


def unpatchify(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches (B, N, p * p * C) in raster order, padding behind, as images (B, C, rows * p, cols * p)."""
    rows, cols = grid
    channels = 3 if patches.shape[-1] % 3 == 0 else 1
    side = math.isqrt(patches.shape[-1] // channels)
    tiles = patches[:, : rows * cols].reshape(-1, rows, cols, side, side, channels)
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, rows * side, cols * side)


def unprocess(pixels: Tensor, processor: Any) -> Tensor:
    """Pixel values (B, C, H, W) as the processor made them, back to 0..255."""
    if getattr(processor, "do_flip_channel_order", False):
        pixels = pixels.flip(1)
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if getattr(processor, "do_normalize", True) and mean is not None and std is not None:
        means, stds = (torch.tensor(numbers).view(1, -1, 1, 1) for numbers in (mean, std))
        # EfficientNet divides by the deviation a second time for its classifier.
        twice = getattr(processor, "include_top", False)
        pixels = pixels * (stds.square() if twice else stds) + means
    factor = processor.rescale_factor if getattr(processor, "do_rescale", False) else 1.0
    offset = 1.0 if getattr(processor, "rescale_offset", False) else 0.0
    return (pixels + offset) / factor
