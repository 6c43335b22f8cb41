"""Laws of the grid: raster order, pixels and players there and back, and cells shared out among players."""

import pytest
import torch

from shapadapter.core.grid import Grid, pixels_to_players, shares

OFFSETS = [(0.0, 0.0), (-0.48, -0.48), (0.48, 0.2), (3.0, -7.0)]


def test_coverage_is_the_mean_of_each_tile():
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, 0] = mask[2:, 3:] = True
    assert torch.allclose(pixels_to_players(mask, Grid(2, 2)), torch.tensor([[1 / 6, 0], [0, 1]]))
    with pytest.raises(ValueError, match="4 x 6 pixels"):
        pixels_to_players(mask, Grid(3, 2))
    with pytest.raises(ValueError, match="4 x 6 pixels"):
        pixels_to_players(mask, Grid(2, 4))


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("players", [Grid(7, 7), Grid(14, 14), Grid(3, 5), Grid(1, 2), Grid(10, 4)])
@pytest.mark.parametrize("cells", [Grid(7, 7), Grid(4, 6), Grid(2, 2)])
def test_no_contribution_is_lost_or_made(cells, players, offset):
    matrix = shares(cells, players, offset)
    assert matrix.shape == (players.rows * players.cols, cells.rows * cells.cols)
    assert torch.allclose(matrix.sum(dim=0), torch.ones(cells.rows * cells.cols), atol=1e-5)
    assert (matrix >= 0).all()
    assert matrix.isfinite().all()


def test_one_grid_for_both_is_the_identity():
    assert torch.allclose(shares(Grid(3, 4), Grid(3, 4)), torch.eye(12), atol=1e-6)


def test_coarser_players_get_the_sum_of_their_cells():
    values = torch.randn(4, 6)
    shared = shares(Grid(4, 6), Grid(2, 3)) @ values.flatten()
    blocks = values.unflatten(1, (3, 2)).unflatten(0, (2, 2)).sum(dim=(1, 3))
    assert torch.allclose(shared.view(2, 3), blocks, atol=1e-5)


def test_finer_players_get_equal_parts():
    values = torch.randn(2, 3)
    shared = (shares(Grid(2, 3), Grid(6, 6)) @ values.flatten()).view(6, 6)
    expected = values.repeat_interleave(3, 0).repeat_interleave(2, 1) / 6
    assert torch.allclose(shared, expected, atol=1e-6)


def test_grids_that_do_not_divide_share_by_area():
    """Two cells and three players: the middle one gets a third of each cell's width on either side."""
    matrix = shares(Grid(1, 2), Grid(1, 3))
    assert torch.allclose(matrix, torch.tensor([[2 / 3, 0], [1 / 3, 1 / 3], [0, 2 / 3]]), atol=1e-6)


@pytest.mark.parametrize(("offset", "way"), [((0.5, 0.0), "down"), ((0.0, 0.5), "right"), ((-0.5, 0.0), "up")])
def test_an_offset_moves_what_a_cell_says_to_where_it_looks(offset, way):
    """The middle of three cells, which gave all to the middle of three players, now gives half to the next."""
    shared = shares(Grid(3, 3), Grid(3, 3), offset)[:, 4].view(3, 3)
    expected = torch.zeros(3, 3)
    expected[1, 1] = 0.5
    expected[{"down": (2, 1), "right": (1, 2), "up": (0, 1)}[way]] = 0.5
    assert torch.allclose(shared, expected, atol=1e-6)


def test_an_offset_moves_no_contribution_out_of_the_image():
    matrix = shares(Grid(1, 4), Grid(1, 4), (0.0, 0.5))
    assert matrix[:, 3].tolist() == [0, 0, 0, 1]
    assert matrix[:, 0].tolist() == [0.5, 0.5, 0, 0]


def test_the_centre_of_a_cell_moves_by_the_offset():
    """On fine players: the mean place of a share is the cell's centre plus the offset."""
    places = (torch.arange(70) + 0.5) / 10  # in cells
    for offset in (-0.48, 0.0, 0.3):
        matrix = shares(Grid(1, 7), Grid(1, 70), (0.0, offset))
        assert torch.allclose(places @ matrix[:, 1:6], torch.arange(1, 6) + 0.5 + offset, atol=1e-3)
