"""How the players lie on an image and on the model's cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shapadapter.errors import ImageError
from shapadapter.grid import Grid, shares

from .anatomy import Anatomy
from .carrier import Removal


@dataclass(frozen=True)
class Tiling:
    """The players of one batch of images.

    Attributes:
        players: (rows, cols) of the players.
        cells: (rows, cols) of the model's cells.
        seen: (height, width) of the part of the image that the players tile.
        offset: (down, right) by which the cells look beside their own place, in cells.
    """

    players: tuple[int, int]
    cells: tuple[int, int]
    seen: tuple[int, int]
    offset: tuple[float, float] = (0.0, 0.0)

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
        """Which part of each cell belongs to present players: (R, N) bool to (R, cells) fp32."""
        weights = present.float()
        with torch.autocast(present.device.type, enabled=False):
            return weights if self.players == self.cells else weights @ self._shares(weights)

    def present_cells(self, present: Tensor) -> Tensor:
        """The cells of present players, where each cell belongs to one player: (R, N) bool to (R, cells) bool."""
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

    Raises:
        ImageError: the grid does not divide the image, or not the patches where these are removed whole.
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
