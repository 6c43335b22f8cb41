"""Refinement as arithmetic: law 10 on random games whose Shapley values are known."""

import functools
import math

import pytest
import torch

from shapadapter.core import estimates as refinement
from shapadapter.core.estimates import (
    exact_posterior,
    exact_shapley_values,
    kernel_shap,
    relative_error,
    shapley_posterior,
)
from shapadapter.core.shapley import all_coalitions, sample_in_turns, sample_sizes, size_distribution

CLASSES = 4
GOOD, MEDIOCRE, USELESS = 0.1, 0.5, 3.0


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sigmoid(present, draw):
    """Evidence that saturates smoothly."""
    return 4 * torch.sigmoid(present @ draw(present.shape[1], CLASSES) * 1.5 + draw(CLASSES))


def redundant(present, draw):
    """Each player alone shows most of it."""
    strength = draw(present.shape[1], CLASSES).sigmoid() ** 3
    return 5 - 5 * torch.exp(present @ torch.log1p(-0.95 * strength))


def network(present, draw):
    """A random network: interactions of every order."""
    players = present.shape[1]
    hidden = torch.relu(present @ draw(players, 12) * 2 / players**0.5 + 1.5 * draw(12))
    return hidden @ draw(12, CLASSES) + present @ draw(players, CLASSES) * 0.3


def majority(present, draw):
    """A jump where enough weight has come together."""
    weights = draw(present.shape[1], CLASSES).square()
    return (present @ weights > weights.sum(0) / 2).double() + 0.2 * (present @ draw(present.shape[1], CLASSES))


GAMES = (sigmoid, redundant, network, majority)


class Game:
    """A random game with all its values."""

    def __init__(self, kind, players, seed):
        source = generator(seed)
        self.players = players
        self.table = kind(
            all_coalitions(players).double(), lambda *shape: torch.randn(*shape, generator=source).double()
        )
        self.truth = exact_shapley_values(self.table)
        self.null, self.full = self.table[0], self.table[-1]

    def values(self, coalitions):
        return self.table[(coalitions.long() << torch.arange(self.players)).sum(-1)]

    def prediction(self, quality, seed):
        """The truth with an error of `quality` times its spread over the players."""
        noise = torch.randn(self.truth.shape, generator=generator(seed)).double()
        noise = (noise - noise.mean(0)) / noise.std(0, correction=0)
        return self.truth + quality * self.truth.std(0, correction=0) * noise

    def sample(self, evaluations, seed):
        source = generator(1000 + seed)
        if not evaluations:
            return torch.empty(0, self.players, dtype=torch.bool), torch.empty(0, CLASSES)
        coalitions = sample_in_turns(self.players, sample_sizes(self.players, evaluations // 2, source), source)
        return coalitions, self.values(coalitions)

    def refine(self, quality, evaluations, seed=0):
        return shapley_posterior(self.prediction(quality, seed), *self.sample(evaluations, seed), self.null, self.full)

    def error(self, estimate):
        return ((estimate - self.truth).norm(dim=0) / self.truth.norm(dim=0)).mean().item()


@functools.cache
def games(players, count=3):
    return [Game(kind, players, seed) for seed in range(count) for kind in GAMES]


def test_without_evaluations_the_prediction_is_returned_and_nothing_is_known_of_its_error():
    game = Game(network, 6, 0)
    prediction = game.prediction(0.5, 0).float() + 1  # not even efficient
    posterior = shapley_posterior(prediction, *game.sample(0, 0), game.null, game.full)
    assert torch.equal(posterior.mean.float(), prediction)
    assert posterior.standard_error.isnan().all()


@pytest.mark.parametrize("evaluations", [2, 8, 30, 400])
def test_the_mean_is_efficient(evaluations):
    for game in games(8, 1):
        prediction = game.prediction(USELESS, 0) + 0.3
        posterior = shapley_posterior(prediction, *game.sample(evaluations, 0), game.null, game.full)
        assert (posterior.mean.sum(0) - (game.full - game.null)).abs().max() < 1e-9


@pytest.mark.parametrize("quality", [GOOD, MEDIOCRE, USELESS])
def test_the_error_falls_with_every_fourfold_effort(quality):
    errors = []
    for evaluations in (0, 16, 64, 256, 1020):
        found = [game.error(game.refine(quality, evaluations, s).mean) for s, game in enumerate(games(10))]
        errors.append(sum(found) / len(found))
    if quality == GOOD:  # a few evaluations cannot tell that a prediction is this good
        assert errors[1] < 2 * errors[0]
        errors = errors[1:]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.06


def test_a_good_prediction_is_worth_evaluations_and_a_useless_one_costs_none():
    for evaluations in (40, 100, 400):
        found = {GOOD: [], USELESS: [], "plain": []}
        for seed, game in enumerate(games(12)):
            for quality in (GOOD, USELESS):
                found[quality].append(game.error(game.refine(quality, evaluations, seed).mean))
            estimate = kernel_shap(*game.sample(evaluations, seed), game.null, game.full)
            found["plain"].append(game.error(estimate))
        good, useless, plain = (sum(errors) / len(errors) for errors in found.values())
        assert good < (0.5 if evaluations < 200 else 0.75) * plain
        assert useless < 1.05 * plain


@pytest.mark.parametrize("quality", [GOOD, MEDIOCRE, USELESS])
@pytest.mark.parametrize("players", [6, 12])
def test_intervals_cover_the_truth_as_often_as_they_say(players, quality):
    """Law 10, for every budget by itself."""
    for evaluations in (8, 16, 32, 64, 128, 512, 1024):
        if evaluations >= 2**players - 2:
            continue
        inside, total = {0.8: 0, 0.95: 0}, 0
        for seed, game in enumerate(games(players, 6)):
            posterior = game.refine(quality, evaluations, seed)
            total += game.truth.numel()
            for level in inside:
                low, high = posterior.interval(level)
                inside[level] += int(((low <= game.truth) & (game.truth <= high)).sum())
        # Players of a game are not independent; and of a good prediction a few evaluations cannot know that it is.
        assert 0.88 < inside[0.95] / total < (1 if quality == GOOD or evaluations < 64 else 0.99), evaluations
        assert inside[0.8] / total > 0.7, evaluations


def test_intervals_cover_the_truth_about_95_percent_of_the_time():
    """Law 10 over everything at once."""
    covered = []
    for players in (6, 8, 10, 12):
        for quality in (GOOD, MEDIOCRE, USELESS):
            for evaluations in (8, 16, 32, 64, 128, 512, 1024):
                if evaluations < 2**players - 2:
                    for seed, game in enumerate(games(players, 1)):
                        low, high = game.refine(quality, evaluations, 50 + seed).interval()
                        covered.append(((low <= game.truth) & (game.truth <= high)).double().mean())
    assert 0.93 < torch.stack(covered).mean() < 0.975


@pytest.mark.parametrize("quality", [MEDIOCRE, USELESS])
def test_noise_that_differs_from_size_to_size(quality):
    """64 players, and products of 2 to 6 of them, of which each has an equal share."""
    source = generator(3)
    teams = torch.stack([torch.rand(64, generator=source).argsort() < 2 + i % 5 for i in range(300)]).double()
    worth = torch.randn(300, CLASSES, generator=source).double()
    truth = (teams / teams.sum(1, keepdim=True)).T @ worth
    null, full = torch.zeros(CLASSES), worth.sum(0)
    covered, lengths = [], []
    for _ in range(10):
        noise = torch.randn(64, CLASSES, generator=source).double()
        prediction = truth + quality * truth.std(0) * (noise - noise.mean(0))
        coalitions = sample_in_turns(64, sample_sizes(64, 256, source), source)
        values = (coalitions.double() @ teams.T == teams.sum(1)).double() @ worth
        posterior = shapley_posterior(prediction, coalitions, values, null, full)
        low, high = posterior.interval()
        covered.append(((low <= truth) & (truth <= high)).double().mean())
        lengths.append((posterior.mean - truth).norm(dim=0) / posterior.standard_error.norm(dim=0))
    assert 0.935 < torch.stack(covered).mean() < 0.97
    assert 0.9 < torch.stack(lengths).mean() < 1.03  # with the noise taken for even: 1.06 and 1.1


def test_additive_games_are_found_exactly_from_any_prediction():
    source = generator(1)
    truth = torch.randn(9, CLASSES, generator=source).double()
    coalitions = sample_in_turns(9, sample_sizes(9, 40, source), source)
    posterior = shapley_posterior(
        torch.randn(9, CLASSES),
        coalitions,
        coalitions.double() @ truth + 2,
        torch.full((CLASSES,), 2.0),
        truth.sum(0) + 2,
    )
    assert (posterior.mean - truth).abs().max() < 1e-5
    assert posterior.standard_error.max() < 1e-4


def test_a_perfect_prediction_of_an_additive_game_stays():
    source = generator(2)
    truth = torch.randn(9, CLASSES, generator=source).double()
    truth[:, 0] = 0  # a class that is constant
    coalitions = sample_in_turns(9, sample_sizes(9, 10, source), source)
    posterior = shapley_posterior(truth, coalitions, coalitions.double() @ truth, torch.zeros(CLASSES), truth.sum(0))
    assert (posterior.mean - truth).abs().max() < 1e-9
    assert posterior.standard_error.max() < 1e-9
    assert posterior.relative_error.isfinite().all()


def test_a_dummy_player_is_found_out():
    table = Game(network, 8, 4).table.clone()
    members = all_coalitions(8)
    table[members[:, 5]] = table[~members[:, 5]]  # whether player 5 is present never matters
    game = Game(network, 8, 4)
    game.table, game.truth, game.null, game.full = table, exact_shapley_values(table), table[0], table[-1]
    assert exact_posterior(table).mean[5].abs().max() < 1e-12
    assert (exact_posterior(table).standard_error == 0).all()
    found = [game.refine(MEDIOCRE, evaluations, 1) for evaluations in (0, 64, 4096)]
    sizes = [posterior.mean[5].norm() for posterior in found]
    assert sizes[2] < 0.05 * sizes[0]
    assert (found[1].mean[5].abs() < 3 * found[1].standard_error[5]).all()


def test_it_does_not_matter_in_which_unit_or_order_the_game_is_played():
    game = Game(network, 8, 0)
    prediction, (coalitions, values) = game.prediction(MEDIOCRE, 0), game.sample(40, 0)
    found = shapley_posterior(prediction, coalitions, values, game.null, game.full)
    larger = shapley_posterior(
        1000 * prediction, coalitions, 1000 * values + 7, 1000 * game.null + 7, 1000 * game.full + 7
    )
    order = torch.randperm(8, generator=generator())
    moved = shapley_posterior(prediction[order], coalitions[:, order], values, game.null, game.full)
    for name in ("mean", "standard_error"):
        assert torch.allclose(getattr(larger, name), 1000 * getattr(found, name))
        assert torch.allclose(getattr(moved, name), getattr(found, name)[order])
    assert torch.allclose(larger.relative_error, found.relative_error)


def test_images_and_classes_are_fitted_each_by_itself():
    some = [Game(kind, 7, 3) for kind in GAMES]
    parts = [
        (game.prediction(MEDIOCRE, 0), *game.sample(24, seed), game.null, game.full) for seed, game in enumerate(some)
    ]
    together = shapley_posterior(*(torch.stack(arguments) for arguments in zip(*parts, strict=True)))
    for index, part in enumerate(parts):
        alone = shapley_posterior(*part)
        assert torch.allclose(together.mean[index], alone.mean)
        assert torch.allclose(together.standard_error[index], alone.standard_error)
        prediction, coalitions, *values = part
        one = shapley_posterior(prediction[:, 2:3], coalitions, *(value[..., 2:3] for value in values))
        assert torch.allclose(one.standard_error, alone.standard_error[:, 2:3])


def test_the_posterior_is_that_of_the_stated_model(monkeypatch):
    """Against brute force: both scales on a grid, dense covariances, no decomposition."""
    monkeypatch.setattr(refinement._Fit, "_spread", lambda self: torch.ones(1))  # which is no part of the model
    game, players = Game(network, 5, 1), 5
    prediction, (coalitions, values) = game.prediction(1.0, 0), game.sample(16, 0)
    posterior = shapley_posterior(prediction, coalitions, values, game.null, game.full)
    z = coalitions[::2].double() - coalitions[::2].double().mean(1, keepdim=True)
    residual = values - game.null - coalitions.double() @ prediction
    y = (residual[::2] - residual[1::2])[:, 0] / 2
    prior = torch.eye(players).double() - 1 / players
    sizes = torch.arange(1, players)
    length = (size_distribution(players) * sizes * (players - sizes) / players).sum()
    noise = torch.linspace(-14, 6, 401).double().exp()  # sigma^2; its prior is even in the logarithm
    weights, means, seconds = [], [], []
    for log_ratio in torch.linspace(-10, 30, 81).tolist():
        tau = math.exp(log_ratio) / length * prior
        covariance = z @ tau @ z.T + torch.eye(len(y))
        likelihood = -covariance.logdet() / 2 - len(y) / 2 * noise.log() - y @ covariance.inverse() @ y / noise / 2
        gain = tau @ z.T @ covariance.inverse()
        weights.append(likelihood - math.log(2 * math.cosh(log_ratio / 2)))
        means.append((gain @ y).expand(len(noise), -1))
        seconds.append(noise[:, None] * (tau - gain @ z @ tau).diag() + (gain @ y).square())
    weight = torch.cat(weights).softmax(0)
    mean, second = weight @ torch.cat(means), weight @ torch.cat(seconds)
    assert torch.allclose(posterior.mean[:, 0], prediction[:, 0] + mean, rtol=1e-5)
    assert torch.allclose(posterior.standard_error[:, 0], (second - mean.square()).sqrt(), rtol=1e-3)


def test_one_or_two_pairs_say_nothing_of_their_noise():
    game = Game(network, 8, 0)
    for evaluations in (2, 4):
        posterior = game.refine(MEDIOCRE, evaluations)
        assert posterior.mean.isfinite().all()
        assert posterior.standard_error.isinf().all()
    assert game.refine(MEDIOCRE, 6).standard_error.isfinite().all()


def test_coalitions_without_their_complements_are_refused():
    game = Game(network, 6, 0)
    coalitions, values = game.sample(8, 0)
    for wrong in (coalitions[:7], coalitions.roll(1, 0)):
        with pytest.raises(ValueError, match="complements"):
            shapley_posterior(game.truth, wrong, values[: len(wrong)], game.null, game.full)


def test_the_relative_error_is_a_length():
    error = relative_error(torch.tensor([[3.0, 0, 0], [4, 0, 0]]), torch.tensor([[0.6, 0, 1], [0.8, 0, 0]]))
    assert error.tolist() == pytest.approx([0.2, 0, math.inf])


# Coalitions in which the players take turns.


def test_turns_keep_the_law_of_sizes_and_of_subsets():
    source, players = generator(0), 7
    sizes = sample_sizes(players, 50_000, source)
    present = sample_in_turns(players, sizes, source)
    assert torch.equal(present[0::2], ~present[1::2])
    assert torch.equal(present[0::2].sum(1), torch.minimum(sizes, players - sizes))
    # Every coalition as often as the kernel law says: of its size, times one of the subsets of this size.
    index = (present.long() << torch.arange(players)).sum(1)
    law = torch.zeros(2**players).double()
    for bits, members in enumerate(all_coalitions(players).sum(1).tolist()):
        if 0 < members < players:
            law[bits] = size_distribution(players)[members - 1] / math.comb(players, members)
    share = torch.bincount(index, minlength=2**players) / len(index)
    assert (share - law).abs().max() < 0.001
    assert share[0] == share[-1] == 0


def test_no_player_comes_twice_before_all_have_come():
    present = sample_in_turns(12, torch.tensor([1] * 12 + [10] * 6 + [3] * 8), generator())[0::2]
    assert present[:12].sum(0).tolist() == [1] * 12
    assert present[12:18].sum(0).tolist() == [1] * 12  # of size 10 the complements
    assert present[18:].sum(0).tolist() == [2] * 12
    assert len({tuple(row) for row in sample_in_turns(8, torch.full((9,), 4), generator())[0::2].tolist()}) > 6


def test_turns_are_reproducible_and_lower_the_error():
    sizes = torch.tensor([1, 2, 3, 5, 9])
    assert torch.equal(sample_in_turns(10, sizes, generator(4)), sample_in_turns(10, sizes, generator(4)))
    assert not torch.equal(sample_in_turns(10, sizes, generator(4)), sample_in_turns(10, sizes, generator(5)))
    turns, independent = [], []
    for seed, game in enumerate(games(12)):
        source = generator(seed)
        sizes = sample_sizes(12, 50, source)
        alone = torch.cat([sample_in_turns(12, size[None], source) for size in sizes])
        for found, coalitions in ((turns, sample_in_turns(12, sizes, source)), (independent, alone)):
            estimate = kernel_shap(coalitions, game.values(coalitions), game.null, game.full)
            found.append(game.error(estimate))
    assert sum(turns) < 0.9 * sum(independent)
