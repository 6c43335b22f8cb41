"""The grid of players. Players are numbered in raster order, row by row."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """How the players tile an image: in so many rows from top to bottom, and columns from left to right."""

    rows: int
    cols: int


def pixels_to_players(mask: Tensor, grid: Grid) -> Tensor:
    """Average a pixel mask (..., H, W), e.g. 1 inside an object and 0 outside, over tiles: (..., rows, cols) float32.

    Raises:
        ValueError: If the image cannot be cut into equal tiles.
    """
    height, width = mask.shape[-2:]
    if height % grid.rows or width % grid.cols:
        raise ValueError(f"{height} x {width} pixels cannot be cut into {grid.rows} x {grid.cols} equal tiles")
    tiles = mask.float().unflatten(-1, (grid.cols, -1)).unflatten(-3, (grid.rows, -1))  # (..., rows, h, cols, w)
    return tiles.mean(dim=(-3, -1))  # (..., rows, cols)


def shares(cells: Grid, players: Grid, offset: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """Which share of each cell falls to each player, by the area that they have in common.

    Both grids tile the same image. What a cell sees may lie beside its own place: the centre of its receptive field is
    shifted where convolutions are padded on one side.

    Args:
        cells: The grid of the model's features.
        players: The grid of the players.
        offset: (down, right) shift of what the cells see, in cells. What would fall outside the image is left out.

    Returns:
        (players, cells) float32; each column sums to 1, so that no contribution is lost or made.
    """
    down = _shares_along(cells.rows, players.rows, offset[0])  # (player rows, cell rows)
    right = _shares_along(cells.cols, players.cols, offset[1])  # (player cols, cell cols)
    return torch.kron(down, right)


def _shares_along(cells: int, players: int, offset: float) -> Tensor:
    """Shares along one axis, (players, cells): the overlap of intervals of length 1 / cells and 1 / players."""
    # A cell stays in the image by half at least, so that it has a place.
    starts = (torch.arange(cells, device="cpu") + offset).clamp(-0.5, cells - 0.5) / cells
    edges = torch.arange(players + 1, device="cpu") / players
    low = torch.maximum(starts[None], edges[:-1, None])  # (players, cells)
    high = torch.minimum(starts[None] + 1 / cells, edges[1:, None])
    overlap = (high - low).clamp(min=0)
    return overlap / overlap.sum(dim=0)
