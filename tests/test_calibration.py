"""Several predictions of the Shapley values, calibrated by coalitions; and samples of presence."""

import math

import pytest
import torch
from test_refinement import CLASSES, GAMES, GOOD, MEDIOCRE, USELESS, games, generator

from shapadapter.core.estimates import calibrated_posterior, shapley_posterior
from shapadapter.core.shapley import sample_in_turns, sample_sizes
from shapadapter.explanation.presence import BLOCK, GROUPS, mean_of_live, sample_presence, share_of_head


def calibrated(game, qualities, evaluations, seed=0, weights=None):
    """From predictions of such qualities, each with an error of its own."""
    predictions = torch.stack([game.prediction(one, 31 * seed + turn) for turn, one in enumerate(qualities)], dim=-1)
    weights = torch.full((len(qualities),), 1 / len(qualities)) if weights is None else torch.tensor(weights)
    return calibrated_posterior(predictions, weights, *game.sample(evaluations, seed), game.null, game.full)


def mean_error(estimates):
    found = [game.error(posterior.mean) for game, posterior in estimates]
    return sum(found) / len(found)


# -- calibrated predictions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluations", [0, 2, 8, 30, 400])
def test_the_mean_is_efficient(evaluations):
    for game in games(8, 1):
        posterior = calibrated(game, (MEDIOCRE, USELESS), evaluations)
        assert (posterior.mean.sum(0) - (game.full - game.null)).abs().max() < 1e-9


def test_without_coalitions_the_weights_decide():
    game = games(8, 1)[0]
    one, other = game.prediction(GOOD, 0), game.prediction(USELESS, 1)
    predictions = torch.stack([one, other + 5], dim=-1)  # what is added to all players alike has no say
    ends = game.null, game.full
    found = calibrated_posterior(predictions, torch.tensor([0.75, 0.25]), *game.sample(0, 0), *ends)
    assert (found.mean - (0.75 * one + 0.25 * other)).abs().max() < 1e-9
    assert found.standard_error.isnan().all()


def test_a_perfect_prediction_is_returned():
    """To the last digit where coalitions agree with it, and nearly where they say something besides."""
    source = generator(1)
    truth = torch.randn(9, CLASSES, generator=source).double()
    coalitions = sample_in_turns(9, sample_sizes(9, 40, source), source)
    values = coalitions.double() @ truth + 2
    known = coalitions, values, torch.full((CLASSES,), 2.0), truth.sum(0) + 2
    found = calibrated_posterior(truth[..., None], torch.ones(1), *known)
    assert (found.mean - truth).abs().max() < 1e-9
    assert found.standard_error.max() < 1e-6
    noise = torch.randn(9, CLASSES, generator=source).double()
    beside = torch.stack([truth, noise], dim=-1)
    assert (calibrated_posterior(beside, torch.tensor([1.0, 0.0]), *known).mean - truth).abs().max() < 1e-6
    for evaluations in (16, 64):
        few = [(game, calibrated(game, (0.0,), evaluations, s)) for s, game in enumerate(games(12))]
        plain = [(game, game.refine(USELESS, evaluations, s)) for s, game in enumerate(games(12))]
        assert mean_error(few) < 0.4 * mean_error(plain)


@pytest.mark.parametrize("qualities", [(GOOD,), (USELESS,), (MEDIOCRE, USELESS), (MEDIOCRE, MEDIOCRE, MEDIOCRE)])
def test_many_coalitions_tend_to_the_truth_from_anywhere(qualities):
    errors = []
    for evaluations in (64, 512, 16_384):
        errors.append(mean_error([(g, calibrated(g, qualities, evaluations, s)) for s, g in enumerate(games(10))]))
    assert errors[2] < min(errors[:2])
    assert errors[2] < 0.02


def test_useless_predictions_cost_less_and_less_and_good_ones_help():
    """While pairs are hardly more than the players, little of what they say is believed."""
    for evaluations, most in ((48, 1.7), (100, 1.5), (400, 1.3)):
        found = {"useless": [], "good": [], "plain": []}
        for seed, game in enumerate(games(12)):
            equal = ((game.full - game.null) / 12).expand(12, -1).double()
            found["useless"].append((game, calibrated(game, (USELESS, USELESS), evaluations, seed)))
            found["good"].append((game, calibrated(game, (GOOD, USELESS), evaluations, seed)))
            found["plain"].append(
                (game, shapley_posterior(equal, *game.sample(evaluations, seed), game.null, game.full))
            )
        useless, good, plain = (mean_error(estimates) for estimates in found.values())
        assert useless < most * plain, evaluations
        assert good < 0.8 * plain, evaluations


def test_predictions_are_worth_more_together():
    together = [(g, calibrated(g, (MEDIOCRE,) * 3, 24, s)) for s, g in enumerate(games(12))]
    alone = [(g, calibrated(g, (MEDIOCRE,), 24, s)) for s, g in enumerate(games(12))]
    assert mean_error(together) < 0.85 * mean_error(alone)


@pytest.mark.parametrize("players", [10, 12])
@pytest.mark.parametrize("qualities", [(GOOD, MEDIOCRE), (MEDIOCRE, MEDIOCRE, MEDIOCRE), (MEDIOCRE, USELESS)])
def test_intervals_cover_the_truth(players, qualities):
    """On smooth and rough games, over the budgets."""
    covered = {evaluations: [] for evaluations in (32, 64, 128, 256, 512)}
    for evaluations, shares in covered.items():
        for seed, game in enumerate(games(players, 4)):
            low, high = calibrated(game, qualities, evaluations, seed).interval()
            shares.append(((low <= game.truth) & (game.truth <= high)).double().mean())
    means = {evaluations: float(torch.stack(shares).mean()) for evaluations, shares in covered.items()}
    assert all(0.88 < share < 0.995 for share in means.values()), means
    assert 0.90 < sum(means.values()) / len(means) < 0.99, means


def test_it_does_not_matter_in_which_unit_or_order_the_game_is_played():
    game = games(8, 1)[2]
    predictions = torch.stack([game.prediction(MEDIOCRE, 0), game.prediction(USELESS, 1)], dim=-1)
    weights, (coalitions, values) = torch.tensor([0.6, 0.4]), game.sample(40, 0)
    found = calibrated_posterior(predictions, weights, coalitions, values, game.null, game.full)
    larger = calibrated_posterior(
        1000 * predictions, weights, coalitions, 1000 * values + 7, 1000 * game.null + 7, 1000 * game.full + 7
    )
    order = torch.randperm(8, generator=generator())
    moved = calibrated_posterior(predictions[order], weights, coalitions[:, order], values, game.null, game.full)
    swapped = calibrated_posterior(predictions.flip(-1), weights.flip(0), coalitions, values, game.null, game.full)
    for name in ("mean", "standard_error"):
        assert torch.allclose(getattr(larger, name), 1000 * getattr(found, name), rtol=1e-4)
        assert torch.allclose(getattr(moved, name), getattr(found, name)[order])
        assert torch.allclose(getattr(swapped, name), getattr(found, name))


def test_images_and_classes_are_calibrated_each_by_itself():
    some = games(7, 1)
    assert len(some) == len(GAMES)
    parts = [
        (
            torch.stack([game.prediction(MEDIOCRE, 0), game.prediction(USELESS, 1)], dim=-1),
            torch.tensor([[0.9, 0.1]] * CLASSES),
            *game.sample(24, seed),
            game.null,
            game.full,
        )
        for seed, game in enumerate(some)
    ]
    together = calibrated_posterior(*(torch.stack(arguments) for arguments in zip(*parts, strict=True)))
    for index, part in enumerate(parts):
        alone = calibrated_posterior(*part)
        assert torch.allclose(together.mean[index], alone.mean)
        assert torch.allclose(together.standard_error[index], alone.standard_error)
        predictions, weights, coalitions, *values = part
        one = calibrated_posterior(predictions[:, 2:3], weights[2:3], coalitions, *(v[..., 2:3] for v in values))
        assert torch.allclose(one.mean, alone.mean[:, 2:3])


@pytest.mark.parametrize("degenerate", ["zero", "alike", "constant class"])
def test_predictions_that_say_nothing_or_the_same(degenerate):
    game = games(8, 1)[2]
    one = game.prediction(MEDIOCRE, 0)
    predictions = torch.stack([one, torch.zeros_like(one) if degenerate == "zero" else one], dim=-1)
    coalitions, values = game.sample(40, 0)
    null, full = game.null, game.full
    if degenerate == "constant class":
        values, null, full = values.clone(), null.clone(), full.clone()
        values[:, 1], null[1], full[1] = 3.0, 3.0, 3.0
        predictions[:, 1] = 0
    found = calibrated_posterior(predictions, torch.tensor([0.5, 0.5]), coalitions, values, null, full)
    assert found.mean.isfinite().all()
    assert found.standard_error.isfinite().all()
    if degenerate == "constant class":
        assert found.mean[:, 1].abs().max() < 1e-9


# -- samples of presence ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("players", [1, 2, 5, 16, 49])
def test_samples_of_presence(players):
    blocks = 6
    presence, live = sample_presence(players, blocks, generator(0), [generator(1), generator(2)])
    assert presence.shape == live.shape == (2, BLOCK * blocks, players)
    assert presence.dtype == torch.float32
    assert ((presence >= 0) & (presence <= 1)).all()
    # Complements, who are live together.
    assert (presence[:, 0::2] + presence[:, 1::2] - 1).abs().max() < 1e-6
    assert torch.equal(live[:, 0::2], live[:, 1::2])
    # Each player is live twice in a block, at m and 1 - m, else there or not.
    assert (live.unflatten(1, (blocks, BLOCK)).sum(dim=2) == 2).all()
    assert ((presence == 0) | (presence == 1) | live).all()
    # As many of the others are there in every image.
    there = (presence * ~live).sum(dim=2)
    if players % GROUPS == 0:
        assert torch.equal(there[0], there[1])
    assert players == 1 or not torch.equal(presence[0], presence[1])


def test_samples_of_an_image_do_not_depend_on_the_others():
    alone = sample_presence(9, 3, generator(0), [generator(2)])
    beside = sample_presence(9, 3, generator(0), [generator(1), generator(2), generator(3)])
    for one, several in zip(alone, beside, strict=True):
        assert torch.equal(one[0], several[1])
    assert not torch.equal(sample_presence(9, 3, generator(0), [generator(4)])[0], alone[0])


def test_degrees_and_sizes_are_uniform():
    presence, live = sample_presence(8, 500, generator(0), [generator(1)])
    degrees = presence[live]
    assert abs(degrees.mean() - 0.5) < 0.01
    assert abs(degrees.var() - 1 / 12) < 0.005
    sizes = (presence * ~live).sum(dim=2).long().flatten().bincount(minlength=5) / (500 * BLOCK)
    assert (sizes - 0.2).abs().max() < 0.03


def test_the_mean_over_samples_of_a_quadratic_game_is_its_shapley_value():
    """Effects of pairs cancel in complements: v(m) = a m + m' B m is explained without any noise."""
    source = generator(5)
    linear, pairs = torch.randn(6, generator=source).double(), torch.randn(6, 6, generator=source).double()
    pairs = (pairs + pairs.T) / 2
    pairs.fill_diagonal_(0)
    presence, live = sample_presence(6, 2, generator(0), [generator(1)])
    gradients = (linear + 2 * presence.double() @ pairs)[..., None]  # (1, R, 6, 1)
    assert torch.allclose(mean_of_live(gradients, live)[0, :, 0], linear + pairs.sum(1), atol=1e-6)


def test_the_share_of_a_head_that_says_nothing_is_nothing():
    felt = torch.randn(2, 9, 3, generator=generator())
    assert torch.equal(share_of_head(torch.zeros_like(felt), felt), torch.zeros(2, 3).double())
    assert torch.allclose(share_of_head(10 * felt, felt), torch.full((2, 3), 0.5).double())
    assert torch.allclose(share_of_head(0.1 * felt, felt), torch.full((2, 3), 0.05).double())
    assert share_of_head(felt, torch.zeros_like(felt)).isfinite().all()
    assert math.isclose(float(share_of_head(felt, felt).mean()), 0.5, rel_tol=1e-6)
