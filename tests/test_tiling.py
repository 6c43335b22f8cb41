"""How the players lie on an image and on the model's cells."""

import families
import pytest
import torch
import zoo

from shapadapter.backbone import Tiling, settle, tile
from shapadapter.core.errors import ImageError
from shapadapter.core.grid import Grid, shares


def images(height, width):
    return torch.zeros(2, 3, height, width)


@pytest.fixture(scope="module")
def vit():
    return settle(families.base("vit"))[0]


@pytest.fixture(scope="module")
def resnet():
    return settle(zoo.base("resnet"))[0]


@pytest.fixture(scope="module")
def perceiver():
    return settle(zoo.base("perceiver_conv"))[0]


def test_by_default_players_are_the_cells(vit, resnet):
    assert tile(vit, None, "drop", (0.0, 0.0), images(32, 48)) == Tiling((4, 6), (4, 6), (32, 48))
    # A border of less than a patch is not seen; a convolution sees it.
    assert tile(vit, None, "drop", (0.0, 0.0), images(35, 48)) == Tiling((4, 6), (4, 6), (32, 48))
    assert tile(resnet, None, "pixels", (0.3, 0.3), images(200, 224)) == Tiling((7, 7), (7, 7), (200, 224))


def test_players_of_whole_patches(vit):
    tiling = tile(vit, (2, 3), "drop", (0.0, 0.0), images(32, 48))
    assert tiling == Tiling((2, 3), (4, 6), (32, 48))
    assert tiling.count == 6


def test_players_of_pixels(resnet, vit):
    tiling = tile(resnet, (4, 3), "pixels", (-0.5, -0.5), images(64, 96))
    assert tiling == Tiling((4, 3), (2, 3), (64, 96), (-0.5, -0.5))
    assert tile(vit, (5, 2), "pixels", (0.0, 0.0), images(40, 48)).seen == (40, 48)


def test_players_of_features_without_a_place(perceiver):
    assert tile(perceiver, None, "pixels", (0.0, 0.0), images(64, 128)) == Tiling((2, 4), (2, 4), (64, 128))
    # However small the image, there are two players each way.
    assert tile(perceiver, None, "pixels", (0.0, 0.0), images(16, 16)).players == (2, 2)
    assert tile(perceiver, (4, 8), "pixels", (0.0, 0.0), images(64, 128)) == Tiling((4, 8), (4, 8), (64, 128))


def test_what_does_not_divide_is_refused(vit, resnet):
    with pytest.raises(ImageError, match=r"grid=\(3, 2\) does not divide the 4 x 4 patches.*use removal='pixels'"):
        tile(vit, (3, 2), "drop", (0.0, 0.0), images(32, 32))
    with pytest.raises(ImageError, match=r"grid=\(8, 8\) does not divide the 4 x 4 patches.*removal='mask'"):
        tile(vit, (8, 8), "mask", (0.0, 0.0), images(32, 32))
    with pytest.raises(ImageError, match=r"grid=\(7, 4\) does not divide images of 64 x 96 pixels"):
        tile(resnet, (7, 4), "pixels", (0.0, 0.0), images(64, 96))
    with pytest.raises(ImageError, match="at least two players"):
        tile(resnet, None, "pixels", (0.0, 0.0), images(32, 32))


def test_attributions_are_shared_out_and_sum_to_the_same():
    contributions = torch.randn(2, 24, 5)
    tiling = Tiling((3, 5), (4, 6), (32, 48), (0.3, -0.4))
    shared = tiling.attributions(contributions)
    assert shared.shape == (2, 15, 5)
    assert torch.allclose(shared.sum(1), contributions.sum(1), atol=1e-5)
    expected = shares(Grid(4, 6), Grid(3, 5), (0.3, -0.4)) @ contributions
    assert torch.allclose(shared, expected)
    same = Tiling((4, 6), (4, 6), (32, 48), (0.3, -0.4))
    assert same.attributions(contributions) is contributions


def test_the_weight_of_a_cell_is_its_part_that_is_present():
    tiling = Tiling((2, 2), (2, 3), (32, 48))
    weights = tiling.cell_weights(torch.tensor([[True, False, False, True], [True] * 4, [False] * 4]))
    expected = torch.tensor([[1, 0.5, 0, 0, 0.5, 1], [1] * 6, [0] * 6])
    assert torch.allclose(weights, expected, atol=1e-6)


def test_weights_and_attributions_are_two_sides_of_one_sharing():
    """What cells of weight w contribute is what the present players get."""
    tiling = Tiling((3, 2), (4, 6), (32, 48), (-0.2, 0.1))
    contributions, present = torch.randn(1, 24, 5), torch.rand(1, 6) < 0.5
    of_players = tiling.attributions(contributions)[present].sum(0)
    of_cells = (contributions * tiling.cell_weights(present)[..., None]).sum((0, 1))
    assert torch.allclose(of_players, of_cells, atol=1e-5)


def test_the_cells_of_present_players():
    tiling = Tiling((2, 2), (4, 6), (32, 48))
    cells = tiling.present_cells(torch.tensor([[True, False, False, True]])).view(4, 6)
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[:2, :3] = expected[2:, 3:] = True
    assert torch.equal(cells, expected)
    assert torch.equal(tiling.cell_weights(torch.tensor([[True, False, False, True]])).bool(), cells.view(1, -1))
