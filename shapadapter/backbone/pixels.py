"""Removal in pixel space: what an image shows where its players are absent.

The only way for models without tokens. What stood in an absent tile has no influence at all, not even through the
blur, which takes the pixels of present players alone.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Fill = Literal["mean", "blur", "learned"]


def fill_absent(
    images: Tensor,
    present: Tensor,
    players: tuple[int, int],
    colour: Tensor,
    blur: bool,
    seen: tuple[int, int] | None = None,
) -> Tensor:
    """Replace the tiles of absent players.

    Args:
        images: (R, C, H, W).
        present: (R, N) bool, True = present.
        players: (rows, cols) of the tiles.
        colour: (C,), shown where nothing else is.
        blur: show, instead, the present pixels around, blurred into the gap; the colour where there are none near.
        seen: (height, width) of the part of the image the players tile, if not the whole. What lies beyond belongs to the
            last row and column: a convolution may reach into it.

    Returns:
        (R, C, H, W).
    """
    seen = seen or (images.shape[2], images.shape[3])
    beyond = (0, images.shape[3] - seen[1], 0, images.shape[2] - seen[0])
    tiles = pixels_of(present, players, seen)[:, None].to(images.dtype)  # (R, 1, h, w)
    kept = F.pad(tiles, beyond, mode="replicate").bool()  # (R, 1, H, W)
    shown = colour.to(images.dtype).view(1, -1, 1, 1).expand_as(images)  # (R, C, H, W)
    if blur:
        shown = _blurred(images, kept, shown, players)
    return torch.where(kept, images, shown)


def pixels_of(present: Tensor, players: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Which pixels belong to present players: (R, N) to (R, H, W) bool. Tiles are equal, up to rounding."""
    rows, cols = (_tile_of(pixels, tiles).to(present.device) for pixels, tiles in zip(size, players, strict=True))
    return present.unflatten(1, players)[:, rows][:, :, cols]  # (R, H, W)


def sum_over_tiles(pixels: Tensor, players: tuple[int, int], seen: tuple[int, int]) -> Tensor:
    """Sum what belongs to pixels over the tile of each player.

    Args:
        pixels: (B, H, W, C).
        players: (rows, cols) of the tiles.
        seen: (height, width) of the part of the image the players tile. What lies beyond belongs to the last row and
            column, as for `fill_absent`.

    Returns:
        (B, N, C) fp32.
    """
    sums = pixels.float()
    for axis, (side, tiles) in enumerate(zip(seen, players, strict=True), start=1):
        beyond = torch.full((pixels.shape[axis] - side,), tiles - 1, device="cpu")
        index = torch.cat([_tile_of(side, tiles), beyond]).to(pixels.device)  # (H,), then (W,)
        shape = (*sums.shape[:axis], tiles, *sums.shape[axis + 1 :])
        sums = sums.new_zeros(shape).index_add(axis, index, sums)  # (B, rows, W, C), then (B, rows, cols, C)
    return sums.flatten(1, 2)


def _tile_of(pixels: int, tiles: int) -> Tensor:
    """The tile in which each pixel's centre lies, (pixels,), in whole numbers: rounding must not shift an edge."""
    return torch.arange(1, 2 * pixels, 2, device="cpu") * tiles // (2 * pixels)


def _blurred(images: Tensor, kept: Tensor, colour: Tensor, players: tuple[int, int]) -> Tensor:
    """The kept pixels (R, 1, H, W) of the images, averaged with Gaussian weights as wide as a tile."""
    weights = kept.to(images.dtype)
    # Not a product: nothing times not-a-number is not nothing.
    masked = torch.where(kept, images, torch.zeros_like(images))  # (R, C, H, W)
    for axis, (pixels, tiles) in enumerate(zip(images.shape[2:], players, strict=True)):
        kernel = _gaussian(pixels / tiles, images)
        masked, weights = _convolve(masked, kernel, axis), _convolve(weights, kernel, axis)
    return torch.where(weights > 1e-3, masked / weights.clamp(min=1e-3), colour)


def _gaussian(sigma: float, like: Tensor) -> Tensor:
    reach = max(1, round(2 * sigma))
    places = torch.arange(-reach, reach + 1, device=like.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (places / sigma).square())
    return (kernel / kernel.sum()).to(like.dtype)  # (2 * reach + 1,)


def _convolve(images: Tensor, kernel: Tensor, axis: int) -> Tensor:
    """Convolve (R, C, H, W) along H (axis 0) or W (axis 1); outside of the image there is nothing."""
    channels, reach = images.shape[1], len(kernel) // 2
    shape = (1, 1, -1, 1) if axis == 0 else (1, 1, 1, -1)
    padding = (reach, 0) if axis == 0 else (0, reach)
    return F.conv2d(images, kernel.view(shape).expand(channels, -1, -1, -1), padding=padding, groups=channels)
