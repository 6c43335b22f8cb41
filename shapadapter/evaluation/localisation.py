"""Do the maps lie on the object, where the data says which pixels it has?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from shapadapter.backbone import sum_over_tiles
from shapadapter.errors import ShapleyError
from shapadapter.explaining import Predicted
from shapadapter.images import prepare_images
from shapadapter.metrics import energy_inside, pointing_game, segmentation

SALIENCY = "colour contrast (no model)"
"""A map without a model: how far the colour of each tile is from the image's mean colour."""


def localisation(maps: Tensor, inside: Tensor) -> dict[str, Tensor]:
    """Every measure against a mask, (B, methods) each.

    Args:
        maps: (B, methods, rows, cols).
        inside: (B, rows, cols) share of each tile inside the object.
    """
    truth = inside[:, None]  # (B, 1, rows, cols)
    parts = segmentation(maps, truth)
    energy = energy_inside(maps, truth)  # (B, methods)
    # A map without positive attribution points nowhere: that is worth what a map that knows nothing gets.
    chance = truth.mean(dim=(-2, -1)).expand_as(energy)  # (B, 1) -> (B, methods)
    return {
        "energy_inside": torch.where(energy.isnan(), chance, energy),
        "pointing_game": pointing_game(maps, truth),
        "segmentation_accuracy": parts.accuracy,
        "segmentation_iou": parts.iou,
        "segmentation_ap": parts.average_precision,
    }


def saliency(batch: Predicted) -> Tensor:
    """The reference maps (B, rows, cols) of pictures in which things stand out by their colour."""
    pictures = batch.seen.float()  # (B, H, W, 3)
    areas = sum_over_tiles(torch.ones_like(pictures[..., :1]), batch.tiling.players, batch.tiling.seen)  # (B, N, 1)
    tiles = sum_over_tiles(pictures, batch.tiling.players, batch.tiling.seen) / areas  # (B, N, 3)
    distance = (tiles - pictures.mean(dim=(1, 2))[:, None]).norm(dim=-1)  # (B, N)
    return distance.double().unflatten(1, batch.tiling.players)


def tiles_inside(inside: NDArray[np.bool_], batch: Predicted, processor: Any | None) -> Tensor:
    """The share of each tile that is part of the object, (rows, cols) float64 in 0..1.

    The mask goes the way of the images: resized and cropped by the same processor.

    Args:
        inside: (H, W), the object's pixels, as large as the image in the data set.
        batch: what the images became.
        processor: the image processor; without one the mask must fit the prepared images.

    Raises:
        ShapleyError: the mask is of another size than the prepared images, and there is no processor.
    """
    size = tuple(batch.inputs["pixel_values"].shape[-2:])
    if processor is not None:
        pixels = _processed(inside, processor)  # (h, w)
    elif inside.shape == size:
        pixels = torch.from_numpy(inside).double()
    else:
        raise ShapleyError(
            f"Without a processor expected masks of the size of the prepared images, {size}, got {inside.shape}."
        )
    height, width = batch.tiling.seen
    return adaptive_avg_pool2d(pixels[None, :height, :width], batch.tiling.players)[0]  # (rows, cols)


def _processed(inside: NDArray[np.bool_], processor: Any) -> Tensor:
    """A mask (H, W) as the processor resizes and crops it, (h, w) in 0..1.

    What a processor does to colours is linear: where black and white end up tells what a grey is.
    """
    shades = [np.zeros_like(inside), np.ones_like(inside), inside]
    pictures = [Image.fromarray(np.repeat(255 * shade.astype(np.uint8)[..., None], 3, axis=2)) for shade in shades]
    black, white, found = prepare_images(pictures, processor)["pixel_values"].double().mean(dim=1)  # (h, w) each
    share = (found - black) / (white - black)  # (h, w)
    return share.nan_to_num(0, 0, 0).clamp(0, 1)  # padding is neither
