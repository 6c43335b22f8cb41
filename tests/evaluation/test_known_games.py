"""Games whose answers are known: values that add up, and a real model against `PatchGame`."""

from types import SimpleNamespace

import pytest
import torch
from small import wrapped

from shapadapter import PatchGame
from shapadapter.backbone import Tiling
from shapadapter.evaluation.deletion import areas, follow, orders
from shapadapter.evaluation.faithfulness import Games, agreement, find_truth, removed_counts, sensitivity
from shapadapter.evaluation.localization import mask_measures
from shapadapter.explanation.passes import Predicted, predictions

NULL = -1.0


class Linear:
    """v(S) = NULL + the sum of the weights (B, N, K) of the players in S."""

    def __init__(self, weights):
        self.weights, self.calls = weights, 0

    def __call__(self, coalitions=None, **inputs):
        self.calls += 1
        present = torch.ones(*self.weights.shape[:2])[:, None] if coalitions is None else coalitions.float()
        values = NULL + torch.einsum("bmn,bnk->bmk", present, self.weights)
        null = torch.full_like(values[:, 0], NULL)
        return SimpleNamespace(logits=NULL + self.weights.sum(1), null_values=null, coalition_values=values)


def linear(batch=2, side=3, classes=3, likelihood="none", rows=64):
    """The games of a linear model, and the weights (B, N) of the explained classes."""
    generator = torch.Generator().manual_seed(5)
    model = Linear(torch.randn(batch, side**2, classes, generator=generator))
    shown = torch.arange(batch)[:, None] % classes
    inputs = {"pixel_values": torch.zeros(batch, 3, side, side)}
    pictures = torch.zeros(batch, side, side, 3, dtype=torch.uint8)
    tiling = Tiling((side, side), (side, side), (side, side))
    names = tuple("abc"[:classes])
    games = Games(model, Predicted(inputs, model(), tiling, pictures, shown, names, likelihood), rows)
    model.calls = 0
    return games, model.weights[torch.arange(batch), :, shown[:, 0]].double()


@pytest.mark.parametrize("side", [3, 6], ids=["enumerated", "KernelSHAP"])
def test_the_truth_of_a_linear_game_is_its_weights(side):
    games, weights = linear(side=side)
    truth = find_truth(games, [7, 3], 256, (128, 256), seed=0)
    torch.testing.assert_close(truth.values, weights, atol=1e-5, rtol=0)
    torch.testing.assert_close(truth.estimates, weights[:, None].expand(-1, 2, -1), atol=1e-5, rtol=0)
    assert truth.errors.max() < 1e-5


def test_players_that_work_together_share_what_they_gain():
    games, _ = linear(batch=1)
    values = games.model.weights[0, :, 0]
    games.model.__class__ = type("Pair", (Linear,), {"__call__": _pair})
    games.null.values.fill_(0.0)
    games.full.values.fill_(1.0)
    truth = find_truth(games, [0], 256, (512,), seed=0).values[0]
    expected = torch.zeros(9, dtype=torch.float64)
    expected[[0, 4]] = 0.5
    torch.testing.assert_close(truth, expected)
    assert values.shape == (9,)


def _pair(self, coalitions=None, **inputs):
    """v(S) = 1 if players 0 and 4 are there, for all classes."""
    both = (coalitions[..., 0] & coalitions[..., 4]).float()[..., None].expand(-1, -1, 3)
    return SimpleNamespace(coalition_values=both)


def test_budgets_are_nested_and_independent_of_the_truth():
    games, _ = linear(side=6)
    short, long = (find_truth(games, [0, 1], 256, budgets, seed=0) for budgets in ((64,), (64, 128)))
    torch.testing.assert_close(short.estimates[:, 0], long.estimates[:, 0])


def test_curves_of_a_linear_game_are_sums_of_sorted_weights():
    games, weights = linear()
    order = orders(weights[:, None], [0, 1], seed=0)  # (2, 1, 9)
    curves = follow(games, order)
    ranked = weights.sort(dim=1, descending=True).values
    steps = torch.cat([torch.zeros(2, 1, dtype=torch.float64), ranked.cumsum(1)], dim=1)  # (2, 10)
    torch.testing.assert_close(curves["insertion"][:, 0], NULL + steps, atol=1e-5, rtol=0)
    torch.testing.assert_close(curves["deletion"][:, 0], NULL + steps[:, -1:] - steps, atol=1e-5, rtol=0)
    measures = areas(curves)
    torch.testing.assert_close(measures["aopc_morf"][:, 0], steps.mean(1), atol=1e-5, rtol=0)
    lerf = torch.cat([torch.zeros(2, 1, dtype=torch.float64), ranked.flip(1).cumsum(1)], dim=1)
    torch.testing.assert_close(measures["aopc_lerf"][:, 0], lerf.mean(1), atol=1e-5, rtol=0)
    assert (measures["insertion"] > measures["deletion"]).all()


def test_likelihoods_are_the_probabilities_of_the_explained_class():
    games, _ = linear(likelihood="softmax")
    expected = games.batch.output.logits.double().softmax(1).gather(1, games.batch.classes)
    torch.testing.assert_close(games.full.likelihoods, expected)
    several, _ = linear(likelihood="sigmoid")
    torch.testing.assert_close(several.full.likelihoods, several.full.values.sigmoid())


def test_random_removal_of_a_linear_game():
    games, weights = linear(side=4)
    right, wrong = weights, weights.roll(1, dims=1)
    constant = torch.ones_like(weights)
    found = sensitivity(games, torch.stack([right, 3 * right, wrong, constant], dim=1), [0, 1], seed=0)
    assert (found["sensitivity_n"][:, :2] > 1 - 1e-6).all()
    assert (found["faithfulness_correlation"][:, :2] > 1 - 1e-6).all()
    assert (found["infidelity"][:, :2] < 1e-6).all()
    assert (found["sensitivity_n"][:, 2] < 0.9).all()
    assert found["sensitivity_n"][:, 3].tolist() == [0, 0]  # it says nothing
    torch.testing.assert_close(found["infidelity"][:, 3], torch.ones(2, dtype=torch.float64))


def test_the_numbers_of_removed_players_are_those_between_nobody_and_everybody():
    assert removed_counts(2) == [1]
    assert removed_counts(9) == [1, 2, 4, 7, 8]
    assert removed_counts(64) == [6, 16, 32, 48, 58]


def test_agreement_with_the_truth():
    truth = torch.tensor([[4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    maps = torch.stack([truth, 2 * truth, -truth], dim=1)
    found = agreement(maps, truth, [True, False, True])
    assert found["error"][0, [0, 2]].tolist() == pytest.approx([0, 2])
    assert found["error"][0, 1].isnan(), "an error in logits of a method that has no unit"
    assert found["spearman"][0].tolist() == pytest.approx([1, 1, -1])
    assert found["top_k_overlap"][0].tolist() == [1, 1, 0]


@pytest.mark.parametrize("config", [{}, {"prediction": "classifier"}, {"removal": "pixels"}, {"removal": "mask"}])
def test_games_are_those_of_patch_game(config):
    model = wrapped(**config)
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        (batch,) = predictions(model, {"pixel_values": pixels}, None, None, 1, None, 2, {})
        games = Games(model, batch, rows=20)
        coalitions = torch.rand(2, 30, 9) < torch.linspace(0, 1, 30)[:, None]  # of mixed sizes
        played = games.play(coalitions)
        truth = find_truth(games, [0, 1], 256, (16,), seed=0)
    for image in range(2):
        game, column = PatchGame(model, pixels[image]), int(batch.classes[image, 0])
        direct = game.values(coalitions[image])  # (30, K)
        torch.testing.assert_close(played.values[image].float(), direct[:, column], atol=1e-5, rtol=0)
        torch.testing.assert_close(played.likelihoods[image].float(), direct.softmax(1)[:, column], atol=1e-5, rtol=0)
        torch.testing.assert_close(truth.values[image], game.exact()[:, column], atol=1e-5, rtol=0)


def test_few_calls_for_many_coalitions():
    games, _ = linear(batch=4, rows=64)
    games.play(torch.rand(4, 100, 9) < 0.5)
    assert games.model.calls == 7  # 400 coalitions, 16 of each image at a time


def test_a_map_that_says_nothing_is_no_gap_in_the_mean():
    truth = torch.tensor([[1.0, 2.0, 4.0, 8.0]], dtype=torch.float64)
    maps = torch.stack([truth, torch.ones_like(truth)], dim=1)  # (1, 2, N)
    found = agreement(maps, truth, [True, True])
    assert found["pearson"].tolist() == [[pytest.approx(1), 0]]
    assert found["spearman"].tolist() == [[pytest.approx(1), 0]]
    assert agreement(maps, torch.ones_like(truth), [True, True])["pearson"][0, 0].isnan()  # nothing to be known
    inside = torch.tensor([[[1.0, 0.0], [0.5, 0.0]]], dtype=torch.float64)
    silent = -torch.ones(1, 1, 2, 2, dtype=torch.float64)
    assert mask_measures(silent, inside)["energy_inside"].item() == pytest.approx(0.375)  # the share of the area


def test_a_map_that_points_the_wrong_way_is_not_turned_round():
    games, weights = linear(side=4)
    right, wrong = sensitivity(games, torch.stack([weights, -weights], dim=1), [0, 1], seed=0)["infidelity"].unbind(1)
    assert right.max() < 1e-6
    assert wrong.tolist() == [1, 1]
