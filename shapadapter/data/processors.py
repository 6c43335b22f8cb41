"""Image processors: loaded, and where a prepared image lies on its original.

The latter is measured, for every image processor resizes and crops in its own way.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from shapadapter.core.errors import ShapleyError
from shapadapter.data.images import image_side, prepare_opened, unpatchify

_LOW, _HIGH = 10, 190
"""Levels of the first and the last pixel of a ramp. Its mirror image adds up to 200, which no padding does."""

_UNKNOWN = (float("nan"),) * 4
_MOST = 4096

_known: dict[tuple[str, tuple[int, int]], tuple[float, float, float, float]] = {}
"""What has been measured, by a processor's class and settings, and the size of the image."""


def frames(opened: Sequence[Any], processor: Any, shape: tuple[int, int]) -> Tensor:
    """The sizes of images, and where on them the edges of the prepared ones are.

    Args:
        opened: images as `open_image` returns them.
        processor: an image processor, or the processor of images and texts.
        shape: height and width of the upper left part of a prepared image that is asked for.

    Returns:
        (B, 6) float64: height and width of the original, then top, left, bottom and right of the prepared image in its
        pixels: beyond its edges where there is padding, NaN where the processor does more than resize, crop and pad.
    """
    sizes = [image.size[::-1] if isinstance(image, Image.Image) else image.shape[:2] for image in opened]
    lines = {size: _remembered(image_side(processor), size) for size in dict.fromkeys(sizes)}
    found = []
    for size in sizes:
        down, top, across, left = lines[size]
        box = (top, left, top + down * shape[0], left + across * shape[1])
        pairs = zip(box, (0, 0, *size), 2 * (down, across), strict=True)
        # The edge of the original, if the measured value is less than a prepared pixel from it.
        edges = [float(edge) if abs(value - edge) < 0.6 * max(step, 0.5) else value for value, edge, step in pairs]
        found.append([*size, *edges])
    return torch.tensor(found, dtype=torch.float64, device="cpu").view(-1, 6)


def _remembered(processor: Any, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """`_measured`, once for all processors of the same class and settings."""
    if not hasattr(processor, "to_json_string"):
        return _measured(processor, size)
    key = f"{type(processor).__module__}.{type(processor).__qualname__} {processor.to_json_string()}", size
    if key not in _known:
        if len(_known) >= _MOST:
            _known.clear()
        _known[key] = _measured(processor, size)
    return _known[key]


def _measured(processor: Any, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Pixels of the original in a pixel of the prepared image, and where the first one begins: down, then across."""
    try:
        black, white = (
            _picture(Image.new("RGB", (64, 64), shade), processor).flatten(1) for shade in ("black", "white")
        )
        levels = _picture(_ramps(size), processor)  # (3, h, w)
    except Exception:  # a processor of somebody else's, which need not like such pictures
        return _UNKNOWN
    place = (white - black).abs().sum(0).argmax()  # a pixel that is no padding
    black, white = (shade[:, place, None, None] for shade in (black, white))  # (3, 1, 1)
    found = ((levels - black) / (white - black) * 255).numpy()  # (3, h, w) levels of the ramps
    inside = np.abs(found[0] + found[2] - (_LOW + _HIGH)) < 6  # (h, w), False on padding
    rows, cols = inside.any(1).nonzero()[0], inside.any(0).nonzero()[0]
    if not len(rows) or inside[np.ix_(rows, cols)].mean() < 0.95:
        return _UNKNOWN
    red, green, blue = found[:, rows][:, :, cols]
    if red[:, -1].mean() < red[:, 0].mean():  # red and blue have changed places
        red = blue
    down, across = _line(green, 1, rows, size[0]), _line(red, 0, cols, size[1])
    return _UNKNOWN if down is None or across is None else (*down, *across)


def unseen(found: Tensor) -> Tensor:
    """The share of each original that is not in the prepared image, (B,) in 0..1, of `frames`; NaN where not known."""
    sizes, low, high = (
        found[:, :2],
        found[:, 2:4].clamp(min=0),
        torch.minimum(found[:, 4:], found[:, :2]),
    )  # (B, 2) each
    return 1 - ((high - low).clamp(min=0) / sizes).prod(1)


def _picture(image: Image.Image, processor: Any) -> Tensor:
    """The pixels (3, h, w) float64 of an image, prepared."""
    inputs = prepare_opened([image], processor)
    pixels = inputs["pixel_values"].double()
    if pixels.ndim == 3:  # in patches
        rows, cols = inputs["spatial_shapes"][0].tolist()
        pixels = unpatchify(pixels, (rows, cols))
    if pixels.ndim != 4 or pixels.shape[:2] != (1, 3):
        raise ValueError(f"Expected (1, 3, h, w), got {tuple(pixels.shape)}.")
    return pixels[0]


def _ramps(size: tuple[int, int]) -> Image.Image:
    """An image whose colors say where a pixel is: red rises to the right, blue falls, green rises downwards."""
    down, across = (_LOW + (_HIGH - _LOW) * (np.arange(count) + 0.5) / count for count in size)  # (H,), (W,)
    red = np.broadcast_to(np.rint(across), size)  # (H, W)
    green = np.broadcast_to(np.rint(down)[:, None], size)  # (H, W)
    return Image.fromarray(np.stack([red, green, _LOW + _HIGH - red], axis=-1).astype(np.uint8))


def _line(levels: NDArray[Any], along: int, places: NDArray[Any], count: int) -> tuple[float, float] | None:
    """Pixels of the original in a prepared pixel along a ramp, and where the first begins; None if that is no line."""
    if count < 4 or len(places) < 4:
        return None
    where = (levels.mean(along) - _LOW) / (_HIGH - _LOW) * count  # (n,) in pixels of the original
    if levels.std(along).max() > 2:
        return None
    slope = (where[-1] - where[0]) / (places[-1] - places[0])
    # Near the edges the filter of the resizing reads one side only.
    margin = min(round(3 * max(1, 1 / max(slope, 1e-6))), (3 * len(places)) // 8)
    middle = slice(margin, len(places) - margin)
    step, start = np.polyfit(places[middle] + 0.5, where[middle], 1)
    off = np.abs(step * (places[middle] + 0.5) + start - where[middle]).max()
    # Two roundings to a level each, and the steps of what is enlarged without smoothing.
    return (float(step), float(start)) if step > 0 and off < 2.5 * count / (_HIGH - _LOW) + 1 else None


def load_processor(place: str | Path, maker: Any = AutoImageProcessor, **options: Any) -> Any:
    """What a class of transformers makes of the processor in a folder or a repository.

    Raises:
        ShapleyError: it needs torchvision, as those of DINOv3 and PP-LCNet do, and that is not installed.
        OSError, ValueError: whatever else transformers raises.
    """
    try:
        return maker.from_pretrained(place, **options)
    except (ImportError, ValueError) as error:
        if "torchvision" in str(error).lower() and find_spec("torchvision") is None:
            raise ShapleyError(
                f"The image processor in {place} needs torchvision, which is not installed: pip install torchvision, in "
                f"the release that goes with torch {torch.__version__}."
            ) from error
        raise
