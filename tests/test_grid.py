"""Laws of the grid: raster order, and pixels and players there and back."""

import dataclasses

import pytest
import torch

from shapadapter.grid import Grid, pixels_to_players, players_to_pixels, to_map


def test_a_grid_is_a_value():
    grid = Grid(rows=3, cols=5)
    assert grid.players == 15
    assert grid == Grid(3, 5)
    assert hash(grid) == hash(Grid(3, 5))
    with pytest.raises(dataclasses.FrozenInstanceError):
        grid.rows = 4


def test_coverage_is_the_mean_of_each_tile():
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, 0] = mask[2:, 3:] = True
    assert torch.allclose(pixels_to_players(mask, Grid(2, 2)), torch.tensor([[1 / 6, 0], [0, 1]]))
    with pytest.raises(ValueError, match="4 x 6 pixels"):
        pixels_to_players(mask, Grid(3, 2))
    with pytest.raises(ValueError, match="4 x 6 pixels"):
        pixels_to_players(mask, Grid(2, 4))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_pixels_and_players_there_and_back(lead):
    values = torch.randn(*lead, 3, 5, generator=torch.Generator().manual_seed(0))
    pixels = players_to_pixels(values, 12, 35)
    assert pixels.shape == (*lead, 12, 35)
    assert torch.allclose(pixels_to_players(pixels, Grid(3, 5)), values, atol=1e-6)
    assert (pixels[..., :4, 7:14] == values[..., :1, 1:2]).all()


def test_smooth_pixels_keep_constants_and_interpolate():
    assert torch.allclose(players_to_pixels(torch.full((2, 2, 2), 0.7), 8, 8, smooth=True), torch.tensor(0.7))
    step = players_to_pixels(torch.tensor([[0.0, 0, 1, 1]]), 1, 32, smooth=True)[0]
    assert step[12:20].diff().min() > 0
    assert step.max() < 1.2


def test_maps_are_in_raster_order():
    attributions = torch.arange(2 * 6 * 4.0).reshape(2, 6, 4)
    maps = to_map(attributions, Grid(2, 3))
    assert maps.shape == (2, 2, 3, 4)
    assert torch.equal(maps[:, 1, 0], attributions[:, 3])
    with pytest.raises(ValueError, match="2 x 4"):
        to_map(attributions, Grid(2, 4))
