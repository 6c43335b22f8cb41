"""Laws of the measures."""

import pytest
import torch

from shapadapter.metrics import energy_inside, relative_l2


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_relative_error():
    truth = normal(2, 3, 8)
    assert relative_l2(truth, truth).tolist() == [[0] * 3] * 2
    assert torch.allclose(relative_l2(torch.zeros_like(truth), truth), torch.ones(2, 3).double())
    assert torch.allclose(relative_l2(7 * 1.1 * truth, 7 * truth), torch.full((2, 3), 0.1).double())
    assert relative_l2(torch.tensor([3.0, 0]), torch.tensor([3.0, 4])).item() == pytest.approx(0.8)
    assert not relative_l2(truth, torch.zeros_like(truth)).isfinite().any()


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
