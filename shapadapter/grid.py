"""The grid of players: from pixels to players and back. Players are numbered in raster order, row by row."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Grid:
    """How the players tile an image.

    Attributes:
        rows: Number of tiles from top to bottom.
        cols: Number of tiles from left to right.
    """

    rows: int
    cols: int

    @property
    def players(self) -> int:
        """Number of players N."""
        return self.rows * self.cols


def pixels_to_players(mask: Tensor, grid: Grid) -> Tensor:
    """Average a pixel mask over the tile of each player.

    Args:
        mask: (..., H, W) bool or numbers, e.g. 1 inside an object and 0 outside.
        grid: The grid of players; its rows divide H, its columns divide W.

    Returns:
        (..., rows, cols) float32 mean of the mask in each tile.

    Raises:
        ValueError: If the image cannot be cut into equal tiles.
    """
    height, width = mask.shape[-2:]
    if height % grid.rows or width % grid.cols:
        raise ValueError(f"{height} x {width} pixels cannot be cut into {grid.rows} x {grid.cols} equal tiles")
    tiles = mask.float().unflatten(-1, (grid.cols, -1)).unflatten(-3, (grid.rows, -1))  # (..., rows, h, cols, w)
    return tiles.mean(dim=(-3, -1))  # (..., rows, cols)


def players_to_pixels(values: Tensor, height: int, width: int, smooth: bool = False) -> Tensor:
    """Spread one value per player over the pixels of an image.

    Args:
        values: (..., rows, cols) value of each player.
        height: Height H of the image in pixels.
        width: Width W of the image in pixels.
        smooth: Interpolate between the centres of the tiles (bicubic, which may overshoot the largest and smallest
            value a little) instead of filling each tile with its value.

    Returns:
        (..., H, W) float32 values in the unit given.
    """
    maps = values.float().reshape(-1, 1, *values.shape[-2:])  # (..., rows, cols) -> (P, 1, rows, cols)
    pixels = functional.interpolate(maps, (height, width), mode="bicubic" if smooth else "nearest-exact")
    return pixels.reshape(*values.shape[:-2], height, width)  # (P, 1, H, W) -> (..., H, W)


def to_map(attributions: Tensor, grid: Grid) -> Tensor:
    """Lay the players out on their grid.

    Args:
        attributions: (B, N, K) attribution of each player to each class.
        grid: The grid of the N players.

    Returns:
        (B, rows, cols, K), a view.

    Raises:
        ValueError: If the number of players is not that of the grid.
    """
    if attributions.shape[1] != grid.players:
        raise ValueError(f"{attributions.shape[1]} players do not fill a grid of {grid.rows} x {grid.cols}")
    return attributions.unflatten(1, (grid.rows, grid.cols))  # (B, N, K) -> (B, rows, cols, K)
