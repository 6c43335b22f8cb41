"""Localisation on maps whose answer is known, and against scikit-learn."""

import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, jaccard_score

from shapadapter.evaluation.localization import energy_inside, grid_pointing, pointing_game, segmentation


def test_energy_counts_positive_attribution_and_partly_covered_tiles():
    attributions = torch.tensor([[3.0, -9], [1, 4]])
    inside = torch.tensor([[1.0, 1], [0.5, 0]])
    assert energy_inside(attributions, inside).item() == pytest.approx(3.5 / 8)
    assert energy_inside(attributions, torch.ones(2, 2)).item() == 1
    assert energy_inside(attributions, torch.zeros(2, 2)).item() == 0


def test_energy_of_a_uniform_map_is_the_covered_area():
    inside = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(energy_inside(torch.ones(3, 4, 5), inside), inside.mean((1, 2)))


def test_energy_is_nan_without_positive_attribution_and_refuses_other_grids():
    assert energy_inside(-torch.ones(2, 3, 3), torch.ones(3, 3)).isnan().all()
    with pytest.raises(ValueError, match="pixels_to_players"):
        energy_inside(torch.ones(3, 3), torch.ones(48, 48))


INSIDE = torch.tensor([[0.0, 0.2, 0.0], [0.5, 1.0, 0.9], [0.0, 0.6, 0.0]])
"""An object that is more than half of three tiles: (1, 1), (1, 2) and (2, 1)."""


def one_hot(row, col):
    return torch.zeros(3, 3).index_put((torch.tensor(row), torch.tensor(col)), torch.tensor(1.0))


def test_pointing_hits_where_more_than_half_of_the_tile_is_object():
    hits = torch.tensor([[pointing_game(one_hot(row, col), INSIDE).item() for col in range(3)] for row in range(3)])
    assert torch.equal(hits, (INSIDE > 0.5).float())


def test_several_largest_share_the_hit():
    assert pointing_game(one_hot(1, 1) + one_hot(0, 0), INSIDE).item() == 0.5
    assert pointing_game(torch.full((2, 3, 3), -0.7), INSIDE).tolist() == pytest.approx([1 / 3] * 2)


def test_pointing_leaves_out_what_cannot_be_hit():
    inside = torch.stack([INSIDE, INSIDE / 2])
    assert pointing_game(one_hot(1, 1), inside).isnan().tolist() == [False, True]
    assert pointing_game(torch.full((3, 3), torch.nan), INSIDE).isnan()
    with pytest.raises(ValueError, match="pixels_to_players"):
        pointing_game(torch.ones(3, 3), torch.ones(48, 48))


def test_grid_pointing_finds_the_cell():
    attributions = torch.zeros(6, 9)
    attributions[2:4, 3:6] = 1  # the middle of 3 x 3 cells
    attributions[0, 0], attributions[5, 5] = -5, 2
    shares = [grid_pointing(attributions, torch.tensor(cell), 3).item() for cell in range(9)]
    assert shares == pytest.approx([0, 0, 0, 0, 0.75, 0, 0, 0.25, 0])


def test_grid_pointing_of_a_uniform_map_is_chance_in_a_batch():
    cells = torch.tensor([0, 1, 2, 3])
    assert grid_pointing(torch.ones(4, 6, 4), cells, 2).tolist() == [0.25] * 4
    assert grid_pointing(torch.ones(4, 6, 4), cells, 1 + 1).shape == (4,)
    assert grid_pointing(-torch.ones(6, 4), torch.tensor(0), 2).isnan()


def test_grid_pointing_refuses_cells_that_do_not_fit():
    with pytest.raises(ValueError, match="cannot be cut"):
        grid_pointing(torch.ones(6, 7), torch.tensor(0), 2)
    for cell in (-1, 4):
        with pytest.raises(ValueError, match="0 to 3"):
            grid_pointing(torch.ones(6, 6), torch.tensor(cell), 2)


def test_segmentation_equals_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    attributions = torch.randn(20, 6, 6, generator=generator, dtype=torch.float64)
    attributions[10:] = attributions[10:].round()  # with ties
    inside = torch.rand(20, 6, 6, generator=generator)
    result = segmentation(attributions, inside)
    for image in range(20):
        scores, truth = attributions[image].flatten().numpy(), (inside[image] > 0.5).flatten().numpy()
        found = scores > scores.mean()
        assert result.accuracy[image].item() == pytest.approx(accuracy_score(truth, found))
        assert result.iou[image].item() == pytest.approx(jaccard_score(truth, found, average="macro"))
        assert result.average_precision[image].item() == pytest.approx(average_precision_score(truth, scores))


def test_segmentation_of_the_object_itself_is_perfect_and_of_nothing_is_chance():
    perfect = segmentation((INSIDE > 0.5).float(), INSIDE)
    assert (perfect.accuracy.item(), perfect.iou.item(), perfect.average_precision.item()) == (1, 1, 1)
    for constant in (0.0, 0.1, 1 / 9):  # their rounded mean can be below them
        nothing = segmentation(torch.full((3, 3), constant), INSIDE)
        assert nothing.accuracy.item() == pytest.approx(6 / 9)
        assert nothing.iou.item() == pytest.approx((0 + 6 / 9) / 2)
        assert nothing.average_precision.item() == pytest.approx(3 / 9)


def test_segmentation_where_all_or_nothing_is_object():
    everything = segmentation(INSIDE, torch.ones(3, 3))
    assert everything.average_precision.item() == 1
    assert everything.accuracy.item() == everything.iou.item() * 2 == pytest.approx(4 / 9)  # 4 are above the mean
    nothing = segmentation(torch.zeros(3, 3), torch.zeros(3, 3))
    assert (nothing.accuracy.item(), nothing.iou.item()) == (1, 1)
    assert nothing.average_precision.isnan()
    with pytest.raises(ValueError, match="pixels_to_players"):
        segmentation(torch.ones(3, 3), torch.ones(48, 48))
