"""The grid of players. Players are numbered in raster order, row by row."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """How the players tile an image.

    Attributes:
        rows: Number of tiles from top to bottom.
        cols: Number of tiles from left to right.
    """

    rows: int
    cols: int


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
