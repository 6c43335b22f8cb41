"""Predicted against true drops: on games whose answer is known, and against captum and scipy."""

import itertools

import pytest
import torch
from captum.metrics import infidelity as captum_infidelity
from scipy import stats

from shapadapter.core.shapley import coalition_sums, gains, sample_paired_coalitions
from shapadapter.evaluation.faithfulness import (
    faithfulness_correlation,
    infidelity,
    normalised_infidelity,
    removal_coalitions,
    sensitivity_n,
)

PLAYERS = 8


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def linear_game(images=3, removed=3, count=40):
    """Attributions, coalitions and values of a linear game: phi is what each player always brings."""
    phi, null = normal(images, PLAYERS), normal(images, seed=1)
    coalitions = removal_coalitions(PLAYERS, removed, count, generator())
    return phi, coalitions, null[:, None] + phi @ coalitions.double().T, null + phi.sum(-1)


def curved_game(present):
    """A game that is not linear: (..., N) -> (...), with pairs and a saturation."""
    weights, pairs = normal(PLAYERS, seed=5), normal(PLAYERS, PLAYERS, seed=6)
    return (present @ weights + ((present @ pairs) * present).sum(-1) / 4).tanh() * 3


def test_removals_have_one_size_and_are_uniform():
    coalitions = removal_coalitions(5, 2, 20_000, generator())
    assert coalitions.dtype == torch.bool
    assert (coalitions.sum(-1) == 3).all()
    codes = ((~coalitions).long() << torch.arange(5)).sum(-1).bincount(minlength=32)
    sets = [sum(1 << player for player in pair) for pair in itertools.combinations(range(5), 2)]
    assert codes[sets].sum() == 20_000
    assert stats.chisquare(codes[sets].numpy()).pvalue > 1e-3
    assert torch.equal(coalitions, removal_coalitions(5, 2, 20_000, generator()))


def test_removals_refuse_none_and_all():
    for removed in (0, 5):
        with pytest.raises(ValueError, match=r"1 \.\. 4"):
            removal_coalitions(5, removed, 3, generator())


@pytest.mark.parametrize("removed", range(1, PLAYERS))
def test_linear_games_are_explained_at_every_n(removed):
    game = linear_game(removed=removed)
    for measure in (sensitivity_n, faithfulness_correlation):
        assert torch.allclose(measure(*game), torch.ones(3).double())
    assert infidelity(*game).max() < 1e-24
    assert normalised_infidelity(*game).max() < 1e-24


def test_sensitivity_is_scipys_correlation_over_coalitions():
    coalitions = removal_coalitions(PLAYERS, 3, 50, generator())
    phi, full = normal(2, PLAYERS), curved_game(torch.ones(PLAYERS).double())
    values = curved_game(coalitions.double()).expand(2, 50)
    got = sensitivity_n(phi, coalitions, values, full.expand(2))
    for image in range(2):
        sums = (~coalitions).double() @ phi[image]
        want = stats.pearsonr(sums.numpy(), (full - values[image]).numpy()).statistic
        assert got[image].item() == pytest.approx(want, abs=1e-12)


def test_sensitivity_is_blind_to_scale_and_sees_the_sign():
    phi, *game = linear_game()
    assert torch.allclose(sensitivity_n(0.01 * phi, *game), torch.ones(3).double())
    assert torch.allclose(sensitivity_n(-phi, *game), -torch.ones(3).double())
    assert (sensitivity_n(normal(3, PLAYERS, seed=9), *game).abs() < 0.95).all()


def test_maps_that_say_nothing_have_no_sensitivity():
    _, *game = linear_game()
    for constant in (0.0, 0.1, 1 / 3):
        assert sensitivity_n(torch.full((3, PLAYERS), constant), *game).isnan().all()
    phi, coalitions, values, full = linear_game()
    assert sensitivity_n(phi, coalitions, torch.full_like(values, 0.3), full).isnan().all()


def test_sensitivity_refuses_coalitions_of_several_sizes():
    mixed = torch.cat([removal_coalitions(PLAYERS, n, 4, generator()) for n in (2, 3)])
    for measure in (sensitivity_n, faithfulness_correlation):
        with pytest.raises(ValueError, match="5 to 6 present"):
            measure(normal(PLAYERS), mixed, normal(8), torch.tensor(0.0))


def test_each_image_may_have_coalitions_of_its_own():
    coalitions = torch.stack([removal_coalitions(PLAYERS, 3, 30, generator(seed)) for seed in range(2)])
    phi, values, full = normal(2, PLAYERS), curved_game(coalitions.double()), torch.zeros(2)
    for measure in (sensitivity_n, infidelity, normalised_infidelity):
        alone = [measure(phi[i], coalitions[i], values[i], full[i]) for i in range(2)]
        assert torch.allclose(measure(phi, coalitions, values, full), torch.stack(alone))


@pytest.mark.parametrize("rescale", [False, True])
def test_infidelity_equals_captums(rescale):
    """Captum's game is played on the players' presence, a vector of ones from which the perturbation is taken."""
    coalitions = sample_paired_coalitions(PLAYERS, 60, generator())
    phi, ones = normal(2, PLAYERS), torch.ones(2, PLAYERS).double()

    def perturb(inputs):
        removed = (~coalitions).double().repeat(2, 1)  # captum lists all samples of the first image, then the next
        return removed, inputs - removed

    theirs = captum_infidelity(curved_game, perturb, ones, phi, n_perturb_samples=60, normalize=rescale)
    values, full = curved_game(coalitions.double()).expand(2, 60), curved_game(ones)
    assert torch.allclose(infidelity(phi, coalitions, values, full, rescale=rescale), theirs)


def test_infidelity_under_the_kernel_law_is_the_shapley_loss():
    """Pairs are closed under complements, and efficiency makes both ends of the game equally good to look from."""
    coalitions = sample_paired_coalitions(PLAYERS, 40, generator())
    null, full = curved_game(torch.zeros(PLAYERS).double()), curved_game(torch.ones(PLAYERS).double())
    values = curved_game(coalitions.double())
    phi = normal(PLAYERS)
    phi = phi + (full - null - phi.sum()) / PLAYERS
    residuals = gains(values[None, :, None], null[None, None]) - coalition_sums(phi[None, :, None], coalitions[None])
    assert infidelity(phi, coalitions, values, full).item() == pytest.approx(residuals.square().mean().item())


def test_normalised_infidelity_has_no_unit():
    phi, coalitions, values, full = linear_game()
    phi = phi + 0.1 * normal(3, PLAYERS, seed=4)
    plain = normalised_infidelity(phi, coalitions, values, full)
    assert torch.allclose(normalised_infidelity(9 * phi, coalitions, 9 * values, 9 * full), plain)
    assert torch.allclose(plain, infidelity(phi, coalitions, values, full) / values.var(-1, correction=0))


def test_rescaling_forgives_the_unit_and_nothing_else():
    phi, *game = linear_game()
    assert normalised_infidelity(-0.2 * phi, *game).min() > 0.1
    assert normalised_infidelity(-0.2 * phi, *game, rescale=True).max() < 1e-20
    other = normal(3, PLAYERS, seed=8)
    best = normalised_infidelity(other, *game, rescale=True)
    grid = torch.linspace(-3, 3, 6001).double()
    tried = torch.stack([normalised_infidelity(factor * other, *game) for factor in grid])
    assert (tried >= best - 1e-12).all()
    assert torch.allclose(tried.min(0).values, best, atol=1e-4)


def test_a_map_of_zeros_gets_at_least_one():
    phi, *game = linear_game()
    for rescale in (False, True):
        nothing = normalised_infidelity(torch.zeros_like(phi), *game, rescale=rescale)
        assert (nothing >= 1).all()
        assert nothing.isfinite().all()
    mean_drop = game[2][:, None] - game[1]
    equal = (mean_drop.mean(-1, keepdim=True) / 3).expand(3, PLAYERS)  # 3 players are removed
    assert torch.allclose(normalised_infidelity(equal, *game), torch.ones(3).double())


def test_a_model_that_says_nothing_has_no_normalised_infidelity():
    phi, coalitions, values, full = linear_game()
    assert normalised_infidelity(phi, coalitions, torch.full_like(values, 0.1), full).isnan().all()
