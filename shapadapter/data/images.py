"""Images as people have them: files, PIL images, arrays and tensors."""

from __future__ import annotations

import errno
import io
import math
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from shapadapter.core.errors import ImageError, UnreadableImageError


def from_array(image: Any) -> Any:
    """An array or tensor (H, W), (H, W, C) or (C, H, W) of 1 or 3 channels as an RGB image.

    Where the shape leaves two ways to read it, arrays have their channels last and tensors first.
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
    colored = np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))  # (H, W, 3)
    return colored if colored.dtype.kind == "f" else Image.fromarray(colored)


def _as_numpy(image: Any) -> NDArray[Any]:
    """Numbers as an array on the CPU."""
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
    """Pixels (H, W, C) or (H, W) in 8 bits: from 0 to 255, grey ones of uint16 from 0 to 65,535, bool as black and white."""
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


IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
"""What image processors make for vision models."""

IMAGE_COLUMNS = ("pixel_values", "image", "img", "jpg", "jpeg", "png", "webp")
"""What the image is called in rows of a data set."""

DECODING_ERRORS = (OSError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow and the file system raise for an image that cannot be read."""


_FILES = (stat.S_IFREG, stat.S_IFDIR)  # the latter with words of its own


def open_image(image: Any) -> Any:
    """Any image as an upright RGB image of 8 bits a channel, transparent parts on white.

    That is a path, an open file, a file's content, a PIL image, an array or tensor (H, W), (H, W, C) or (C, H, W) of 1 or 3
    channels, the `{"bytes": ..., "path": ...}` in which `datasets` keeps a file, or a row with one of these: a dict with
    an image column, or a pair of image and label. Photographs are turned as their EXIF data say; grey images of 16 bits
    are scaled. Floats come back as an array (H, W, 3): only with a processor can be told what range is right.
    """
    image = _of_row(image)
    try:
        content = _content(image)
        if isinstance(content, Image.Image):
            return _upright(content)
        if isinstance(content, str | os.PathLike) and stat.S_IFMT(Path(content).stat().st_mode) not in _FILES:
            raise UnreadableImageError(f"Cannot read image {_name(image)}: a pipe or a device may never end.")
        if isinstance(content, str | os.PathLike) or hasattr(content, "read"):
            with Image.open(content) as file:
                return _upright(file)
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(
            f"Cannot read image {_name(image)}, which unpacks to too much: {error} If it comes from where you trust it, set "
            "PIL.Image.MAX_IMAGE_PIXELS to a larger number first."
        ) from error
    except (*DECODING_ERRORS, ValueError) as error:  # Pillow raises the latter for texts that unpack to too much
        kind = UnreadableImageError if is_damage(error) else ImageError
        raise kind(f"Cannot read image {_name(image)}: {_reason(error)}") from error
    if isinstance(content, Tensor) or hasattr(content, "__array__"):
        return from_array(content)
    if content is None:
        raise UnreadableImageError("There is no image.")
    keys = f" of {sorted(map(str, content))}" if isinstance(content, Mapping) else ""
    raise ImageError(f"Expected a PIL image, a path, an array or a tensor, got {type(content).__name__}{keys}.")


def as_list(images: Any) -> list[Any]:
    """One image or many as a list: what is iterable and no image holds several."""
    listed = list(each(images))
    if not listed:
        raise ImageError("Expected at least one image, got none.")
    return listed


def each(images: Any) -> Iterator[Any]:
    """The images in one image or many, one by one; those of a generator are taken as they are asked for."""
    if isinstance(images, Mapping):  # a row, or several as `datasets` slices them
        images = column if isinstance(column := _of_row(images), list) else images
    elif _is_of_objects(images):
        images = images.tolist()
    if is_one(images):
        yield images
    elif hasattr(images, "__iter__"):
        yield from images
    else:  # torch's data sets end where their length says
        yield from (images[index] for index in range(len(images)))


def is_one(images: Any) -> bool:
    """Whether this is one image, or nothing that could hold several."""
    if isinstance(images, Mapping):
        return not isinstance(_of_row(images), list)
    if isinstance(images, Tensor) or hasattr(images, "__array__"):
        return images.ndim <= 3 and not _is_of_objects(images)
    single = isinstance(images, str | bytes | bytearray | Image.Image) or hasattr(images, "read") or _is_pair(images)
    return single or not (hasattr(images, "__iter__") or hasattr(images, "__getitem__"))


def _is_of_objects(images: Any) -> bool:
    """Whether this is an array of paths or images."""
    return getattr(getattr(images, "dtype", None), "kind", None) in ("O", "U", "S", "T")


def _is_pair(image: Any) -> bool:
    """Whether this is a row as torchvision's data sets have them: image and label."""
    return isinstance(image, tuple) and len(image) == 2 and isinstance(image[1], Integral)


def is_damage(error: Exception) -> bool:
    """Whether one of `DECODING_ERRORS` lies with the image, not with a disk, a network or too many open files."""
    elsewhere = isinstance(error, ConnectionError | TimeoutError)
    return not elsewhere and getattr(error, "errno", None) in (None, errno.ENOENT)


def _of_row(image: Any) -> Any:
    """The image in a row of a data set; what is no row as it is."""
    if _is_pair(image):
        return image[0]
    return image[image_column(image)] if isinstance(image, Mapping) and set(IMAGE_COLUMNS) & image.keys() else image


def _content(image: Any) -> Any:
    """What can be opened of what people and `datasets` call an image."""
    if isinstance(image, bytes | bytearray | memoryview):
        return io.BytesIO(image)
    if not isinstance(image, Mapping) or not {"bytes", "path"} & image.keys():
        return image
    if image.get("bytes") is not None:
        return io.BytesIO(image["bytes"])
    path = image.get("path")
    if "://" in (path or ""):
        from datasets import Image as Feature  # a stream's file on a server, whose address it has made up

        return Feature().decode_example(dict(image))
    return path


def image_column(row: Mapping[str, Any]) -> str:
    """The column of a row's image; of several, as shards of several formats have, the first that is not empty."""
    columns = [name for name in IMAGE_COLUMNS if name in row]
    if not columns:
        raise ImageError(f"Expected an image column named one of {IMAGE_COLUMNS}, got columns {sorted(row)}.")
    return next((name for name in columns if row[name] is not None), columns[0])


def _name(image: Any) -> str:
    if isinstance(image, bytes | bytearray | memoryview):
        return f"of {len(image)} bytes"
    name = image.get("path") if isinstance(image, Mapping) else getattr(image, "filename", None) or image
    return _short(repr(os.fspath(name) if isinstance(name, os.PathLike) else name))


def _reason(error: Exception) -> str:
    """What went wrong, without the file's name, which stands before it."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image, or of a format that Pillow does not know"
    if isinstance(error, IsADirectoryError):
        return "it is a folder. Pass a list of the paths of the images in it."
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
    """An opened image in RGB, turned as its EXIF data say."""
    upright: Image.Image = ImageOps.exif_transpose(image)
    if upright.mode == "F" or upright.mode.startswith("I"):
        # Before version 11, Pillow had no other mode than "I" for 16 bits of a PNG, and has none for those of a PGM.
        sixteen = "16" in upright.mode or image.format in ("PNG", "PPM")
        pixels = np.array(upright)  # (H, W)
        pixels[pixels == image.info.get("transparency", -1)] = 65535 if sixteen else 255
        upright = Image.fromarray(from_sixteen_bits(pixels) if sixteen else eight_bits(pixels))
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    # Pillow knows no way from premultiplied grey to RGBA.
    layer = (upright.convert("LA") if upright.mode == "La" else upright).convert("RGBA")
    if min(layer.getchannel("A").getextrema()) != 255:
        warnings.warn("The transparent parts of images are laid on white.", stacklevel=3)
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def prepare_images(images: list[Any], processor: Any) -> dict[str, Tensor]:
    """Run an image processor, or the image side of a processor of images and texts."""
    return prepare_opened([open_image(image) for image in images], processor)


def prepare_opened(opened: list[Any], processor: Any) -> dict[str, Tensor]:
    """`prepare_images` of what `open_image` has returned."""
    processor = image_side(processor)
    if getattr(processor, "do_rescale", False):
        opened = [Image.fromarray(eight_bits(image)) if isinstance(image, np.ndarray) else image for image in opened]
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
    of_timm = getattr(processor, "data_config", None)  # settings that always scale
    if of_timm is not None:
        mean, std = of_timm["mean"], of_timm["std"]
    if getattr(processor, "do_normalize", True) and mean is not None and std is not None:
        means, stds = (torch.tensor(numbers, device="cpu").view(1, -1, 1, 1) for numbers in (mean, std))
        # EfficientNet divides by the deviation a second time for its classifier.
        twice = getattr(processor, "include_top", False)
        pixels = pixels * (stds.square() if twice else stds) + means
    factor = (
        processor.rescale_factor if getattr(processor, "do_rescale", False) else 1.0 if of_timm is None else 1 / 255
    )
    offset = 1.0 if getattr(processor, "rescale_offset", False) else 0.0
    return (pixels + offset) / factor
