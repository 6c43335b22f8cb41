"""How the players lie on an image and on the model's cells, what shows where they are absent, and where the cells look.

Removal in pixel space is the only way for models without tokens. What stood in an absent tile has no influence at all,
not even through the blur, which takes the pixels of present players alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shapadapter.backbone.anatomy import Anatomy
from shapadapter.backbone.dry_run import noise, undisturbed
from shapadapter.backbone.forward import score
from shapadapter.backbone.hooks import FeatureHooks, ForwardCall, Removal
from shapadapter.core.errors import ImageError
from shapadapter.core.grid import Grid, shares

# measure_offset: cells from border to border, so many that the border cuts off little of a receptive field. Odd: the
# middle cell is in the middle of the image.
_CELLS = 11

# Batches of images, by the seeds of their noise, two images each; more change the second decimal.
_BATCHES = ((0, 1), (2, 3))

# So many features average over more of them than as many images do: two are enough, and large models are slow.
_WIDE, _WIDE_BATCHES = 1024, ((0,),)

# Gradients below the first number are asked for again, multiplied by the second: float32 ends at 1e-45.
_FAINT, _LOUDER = 1e-30, 1e30


@dataclass(frozen=True)
class Tiling:
    """The players of one batch of images."""

    players: tuple[int, int]  # (rows, cols)
    cells: tuple[int, int]  # (rows, cols) of the model's cells
    seen: tuple[int, int]  # (height, width) of the part of the image that the players tile
    offset: tuple[float, float] = (0.0, 0.0)  # (down, right) by which the cells look beside their own place, in cells

    @property
    def count(self) -> int:
        """N."""
        return self.players[0] * self.players[1]

    def attributions(self, contributions: Tensor) -> Tensor:
        """What the cells contribute, (B, cells, K), shared out among the players: (B, N, K). Sums stay as they are."""
        if self.players == self.cells:
            return contributions
        with torch.autocast(contributions.device.type, enabled=False):  # it would multiply in bfloat16
            return self._shares(contributions) @ contributions  # (N, cells) @ (B, cells, K) -> (B, N, K)

    def cell_weights(self, present: Tensor) -> Tensor:
        """Which part of each cell belongs to present players: (R, N) bool or in 0..1 to (R, cells) fp32."""
        weights = present.float()
        with torch.autocast(present.device.type, enabled=False):
            return weights if self.players == self.cells else weights @ self._shares(weights)

    def present_cells(self, present: Tensor) -> Tensor:
        """The cells of present players, where each cell belongs to one player: (R, N) bool or in 0..1 to (R, cells)."""
        if self.players == self.cells:
            return present
        down, right = (cells // players for cells, players in zip(self.cells, self.players, strict=True))
        grid = present.unflatten(1, self.players)  # (R, rows, cols)
        return grid.repeat_interleave(down, 1).repeat_interleave(right, 2).flatten(1)  # (R, cells)

    def _shares(self, like: Tensor) -> Tensor:
        return shares(Grid(*self.cells), Grid(*self.players), self.offset).to(like.device, like.dtype)


def tile(
    anatomy: Anatomy,
    grid: tuple[int, int] | None,
    removal: Removal,
    offset: tuple[float, float],
    pixel_values: Tensor,
    **options: Any,
) -> Tiling:
    """The tiling of images (B, C, H, W) by `grid`, or by the cells if that is None.

    Refuses a grid that does not divide the image, or not the patches where these are removed whole.
    """
    cells = anatomy.cells(pixel_values, **options)
    seen = anatomy.seen(pixel_values, cells)
    if grid is None:
        return Tiling(cells, cells, seen)
    if anatomy.layout == "latents":
        cells = grid  # its features have no places of their own
    size = tuple(pixel_values.shape[-2:])
    if removal != "pixels" and (cells[0] % grid[0] or cells[1] % grid[1]):
        raise ImageError(
            f"grid={grid} does not divide the {cells[0]} x {cells[1]} patches of these images; with removal={removal!r} a "
            "player is a whole number of patches. Choose a divisor, resize the images, or use removal='pixels'."
        )
    if removal == "pixels" and (size[0] % grid[0] or size[1] % grid[1]):
        raise ImageError(
            f"grid={grid} does not divide images of {size[0]} x {size[1]} pixels into equal tiles. Choose a divisor, or "
            "resize the images."
        )
    return Tiling(grid, cells, seen if removal != "pixels" else (size[0], size[1]), offset)


def fill_absent(
    images: Tensor,
    present: Tensor,
    players: tuple[int, int],
    color: Tensor,
    blur: bool,
    seen: tuple[int, int] | None = None,
) -> Tensor:
    """Replace the tiles of absent players in images (R, C, H, W) by a color (C,).

    With `blur`, by the present pixels around, blurred into the gap; the color where there are none near. Players
    `present` (R, N) tile the part `seen` (height, width) of the image, in (rows, cols). What lies beyond belongs to the
    last row and column: a convolution may reach into it. Of players that are present to a degree in 0..1, instead of
    bool, the image and what would replace it are blended.
    """
    seen = seen or (images.shape[2], images.shape[3])
    beyond = (0, images.shape[3] - seen[1], 0, images.shape[2] - seen[0])
    tiles = pixels_of(present, players, seen)[:, None].to(images.dtype)  # (R, 1, h, w)
    share = F.pad(tiles, beyond, mode="replicate")  # (R, 1, H, W)
    shown = color.to(images.dtype).view(1, -1, 1, 1).expand_as(images)  # (R, C, H, W)
    if blur:
        shown = _blurred(images, share, shown, players)
    if present.is_floating_point():
        # Nothing of an absent pixel, whatever the numbers are; a present one as it is, and the slope right at both ends.
        images = torch.where((share > 0) | images.isfinite(), images, 0)
        return torch.lerp(shown, images, share)
    return torch.where(share.bool(), images, shown)


def pixels_of(present: Tensor, players: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Which pixels belong to present players: (R, N) to (R, H, W). Tiles are equal, up to rounding."""
    rows, cols = (_tile_of(pixels, tiles).to(present.device) for pixels, tiles in zip(size, players, strict=True))
    return present.unflatten(1, players)[:, rows][:, :, cols]  # (R, H, W)


def sum_over_tiles(pixels: Tensor, players: tuple[int, int], seen: tuple[int, int]) -> Tensor:
    """Sum what belongs to pixels (B, H, W, C) over the tile of each player, as `fill_absent` has them: (B, N, C) fp32."""
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


def _blurred(images: Tensor, share: Tensor, color: Tensor, players: tuple[int, int]) -> Tensor:
    """The pixels of the images, averaged with Gaussian weights as wide as a tile, by the share (R, 1, H, W) of each."""
    weights = share
    # Not a product alone: nothing times not-a-number is not nothing.
    masked = torch.where(share > 0, images, 0) * share  # (R, C, H, W)
    for axis, (pixels, tiles) in enumerate(zip(images.shape[2:], players, strict=True)):
        sigma = pixels / tiles
        reach = max(1, round(2 * sigma))
        places = torch.arange(-reach, reach + 1, device=images.device, dtype=torch.float32)
        kernel = torch.exp(-0.5 * (places / sigma).square())
        kernel = (kernel / kernel.sum()).to(images.dtype)  # (2 * reach + 1,)
        masked, weights = _convolve(masked, kernel, axis), _convolve(weights, kernel, axis)
    return torch.where(weights > 1e-3, masked / weights.clamp(min=1e-3), color)


def _convolve(images: Tensor, kernel: Tensor, axis: int) -> Tensor:
    """Convolve (R, C, H, W) along H (axis 0) or W (axis 1); outside of the image there is nothing."""
    channels, reach = images.shape[1], len(kernel) // 2
    shape = (1, 1, -1, 1) if axis == 0 else (1, 1, 1, -1)
    padding = (reach, 0) if axis == 0 else (0, reach)
    return F.conv2d(images, kernel.view(shape).expand(channels, -1, -1, -1), padding=padding, groups=channels)


def measure_offset(model: nn.Module, anatomy: Anatomy) -> tuple[float, float]:
    """By how many cells the centre of a cell's receptive field lies below and right of the cell's own centre.

    Where convolutions are padded on one side it is about half a cell, up or down. Measured by the gradient of the
    features with respect to the pixels, on noise, for the cells in the middle: around them lie even both what attention
    to the whole image adds and what the border cuts off. A model of one token for each patch has no offset.
    Returns (down, right), to a hundredth of a cell.
    """
    if anatomy.blocks or anatomy.layout == "latents":
        return 0.0, 0.0
    size = (_CELLS * anatomy.cell[0], _CELLS * anatomy.cell[1])
    try:
        reach = _reach(model, replace(anatomy, sample=size))
    except Exception:  # many things may break in a model that takes one size only
        reach = _reach(model, anatomy)
    down, right = (_centre(reach.sum(dim=1 - axis)) / anatomy.cell[axis] for axis in (0, 1))
    return round(down, 2), round(right, 2)


def _centre(reach: Tensor) -> float:
    """Centre of mass of (L,), from the middle, without the ground on which the peak stands; 0 if there is none."""
    peak = (reach - reach.median()).clamp(min=0)
    if not peak.sum() > 0:
        return 0.0
    places = torch.arange(len(peak), dtype=peak.dtype, device=peak.device) + 0.5 - len(peak) / 2
    return float((peak * places).sum() / peak.sum())


def _reach(model: nn.Module, anatomy: Anatomy) -> Tensor:
    """How much each pixel moves the features of the cells in the middle, on average: (H, W) fp64."""
    batches = _WIDE_BATCHES if anatomy.width >= _WIDE else _BATCHES
    reach = torch.cat([_sensitivity(model, anatomy, seeds) for seeds in batches])  # (R, H, W)
    return (reach / reach.sum(dim=(1, 2), keepdim=True).clamp(min=1e-300)).mean(dim=0)


def _sensitivity(model: nn.Module, anatomy: Anatomy, seeds: tuple[int, ...]) -> Tensor:
    """How much each pixel of some images moves the features of a cell in the middle, (b, H, W) fp64."""
    hooks = FeatureHooks(anatomy)
    images = torch.cat([noise(model, anatomy.family, anatomy.sample, seed)["pixel_values"] for seed in seeds])
    rows, cols = anatomy.cells(images)
    # With an even number of cells there are four in the middle, and the images take turns; else it is one.
    corners = [row * cols + col for row in ((rows - 1) // 2, rows // 2) for col in ((cols - 1) // 2, cols // 2)]
    middle = [corners[image % 4] for image in range(len(images))]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    images.requires_grad_()
    hooks.attach(model)
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with undisturbed(model, gradients=True):
            with hooks.during(ForwardCall(rows * cols)) as call:
                score(model, anatomy, {"pixel_values": images, **anatomy.options})
            assert call.features is not None
            chosen = call.features[range(len(images)), middle]  # (b, D)
            generator = torch.Generator().manual_seed(seeds[0] // 2)
            direction = torch.randn(chosen.shape, generator=generator, device="cpu").to(chosen)
            (gradient,) = torch.autograd.grad(chosen, images, direction, retain_graph=True)
            if gradient.abs().max() < _FAINT:
                (gradient,) = torch.autograd.grad(chosen, images, _LOUDER * direction)
    finally:
        hooks.detach()
        for parameter in trained:
            parameter.requires_grad_(True)
    return gradient.cpu().double().norm(dim=1)  # (b, C, H, W) -> (b, H, W)
