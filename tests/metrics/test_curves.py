"""Insertion and deletion on games whose curves are known."""

import pytest
import torch

from shapadapter.evaluation.deletion import aopc, curve_area, order_of, prefix_coalitions

ATTRIBUTIONS = torch.tensor([0.5, -1, 3, 0, 2])
NULL = 4.0


def linear(coalitions):
    """A game in which every player brings what it always brings: (..., N) -> (...)."""
    return NULL + coalitions.float() @ ATTRIBUTIONS


def test_order_is_from_the_largest_to_the_smallest():
    order = order_of(ATTRIBUTIONS)
    assert order.tolist() == [2, 4, 0, 3, 1]
    assert torch.equal(order_of(ATTRIBUTIONS, torch.Generator().manual_seed(3)), order)
    assert order_of(torch.ones(2, 3)).tolist() == [[0, 1, 2]] * 2


def test_ties_are_broken_at_random_and_by_seed():
    tied = torch.tensor([1.0, 0, 1, 0, 1, 2]).expand(3000, 6)
    orders = order_of(tied, torch.Generator().manual_seed(0))
    assert torch.equal(orders, order_of(tied, torch.Generator().manual_seed(0)))
    assert (orders[:, 0] == 5).all()
    assert torch.equal(orders.sort(dim=-1).values, torch.arange(6).expand(3000, 6))
    first = orders[:, 1].bincount(minlength=6)  # players 0, 2 and 4 share places 1 to 3
    assert first[[1, 3, 5]].sum() == 0
    assert (first[[0, 2, 4]] - 1000).abs().max() < 5 * (3000 * 2 / 9) ** 0.5
    last = orders[:, 5].bincount(minlength=6)
    assert (last[[1, 3]] - 1500).abs().max() < 5 * (3000 / 4) ** 0.5


def test_order_refuses_nan():
    with pytest.raises(ValueError, match="nan"):
        order_of(torch.tensor([1, torch.nan]))


def test_prefixes_add_or_remove_one_player_at_a_time():
    order = torch.tensor([2, 0, 1])
    assert prefix_coalitions(order, insertion=True).int().tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 1], [1, 1, 1]]
    assert prefix_coalitions(order, insertion=False).int().tolist() == [[1, 1, 1], [1, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_prefixes_of_a_batch_are_those_of_each_row():
    orders = torch.stack([torch.randperm(6) for _ in range(8)]).view(2, 4, 6)
    coalitions = prefix_coalitions(orders, insertion=True)
    assert coalitions.shape == (2, 4, 7, 6)
    assert torch.equal(coalitions[1, 2], prefix_coalitions(orders[1, 2], insertion=True))
    assert torch.equal(coalitions.sum(-1), torch.arange(7).expand(2, 4, 7))
    assert torch.equal(~coalitions, prefix_coalitions(orders, insertion=False))


def test_areas_of_a_linear_game():
    order = order_of(ATTRIBUTIONS)
    insertion = linear(prefix_coalitions(order, insertion=True))
    deletion = linear(prefix_coalitions(order, insertion=False))
    assert insertion.tolist() == [4, 7, 9, 9.5, 9.5, 8.5]
    assert deletion.tolist() == [8.5, 5.5, 3.5, 3, 3, 4]
    assert curve_area(insertion).item() == pytest.approx((4 / 2 + 7 + 9 + 9.5 + 9.5 + 8.5 / 2) / 5)
    # What is present in one is absent in the other.
    assert (insertion + deletion).tolist() == [12.5] * 6


def test_the_true_order_of_a_linear_game_beats_every_other():
    orders = torch.cartesian_prod(*[torch.arange(5)] * 5)
    orders = orders[orders.sort(dim=-1).values.eq(torch.arange(5)).all(dim=-1)]  # all 120 permutations
    deletion = linear(prefix_coalitions(orders, insertion=False))
    best = linear(prefix_coalitions(order_of(ATTRIBUTIONS), insertion=False))
    assert len(orders) == 120
    assert curve_area(best) == curve_area(deletion).min()
    assert aopc(best) == aopc(deletion).max()
    worst = linear(prefix_coalitions(order_of(ATTRIBUTIONS).flip(-1), insertion=False))  # least relevant first
    assert aopc(worst) == aopc(deletion).min()


def test_area_of_straight_and_constant_curves():
    assert curve_area(torch.linspace(2, 6, 14)).item() == pytest.approx(4)
    assert curve_area(torch.full((3, 5), 7.0)).tolist() == [7] * 3
    with pytest.raises(ValueError, match="two points"):
        curve_area(torch.ones(3, 1))


def test_aopc_is_the_mean_drop_over_all_points():
    assert aopc(torch.tensor([10.0, 7, 1])).item() == pytest.approx((0 + 3 + 9) / 3)
    assert aopc(torch.full((2, 4), 5.0)).tolist() == [0, 0]
