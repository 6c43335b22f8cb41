"""Laws of the grid: raster order, and pixels and players there and back."""

import pytest
import torch

from shapadapter.grid import Grid, pixels_to_players


def test_coverage_is_the_mean_of_each_tile():
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, 0] = mask[2:, 3:] = True
    assert torch.allclose(pixels_to_players(mask, Grid(2, 2)), torch.tensor([[1 / 6, 0], [0, 1]]))
    with pytest.raises(ValueError, match="4 x 6 pixels"):
        pixels_to_players(mask, Grid(3, 2))
    with pytest.raises(ValueError, match="4 x 6 pixels"):
        pixels_to_players(mask, Grid(2, 4))
