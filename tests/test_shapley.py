"""Laws of the coalition sampler, of the exact values and of KernelSHAP, on random games."""

import itertools
import math

import pytest
import torch

from shapadapter.core.estimates import exact_shapley_values, kernel_shap, kernel_shap_error
from shapadapter.core.shapley import (
    all_coalitions,
    sample_paired_coalitions,
    sample_pairs,
    sample_sizes,
    size_distribution,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_game(players, classes=3, seed=0, noise=0.2):
    """Values of all coalitions: main effects, pairwise interactions and a little of everything."""
    generator = seeded(seed)
    present = all_coalitions(players).double()
    main = torch.randn(players, classes, generator=generator, dtype=torch.float64)
    pair = torch.randn(players, players, classes, generator=generator, dtype=torch.float64) / players
    rest = noise * torch.randn(2**players, classes, generator=generator, dtype=torch.float64)
    return present @ main + torch.einsum("si,sj,ijk->sk", present, present, pair) + rest


def look_up(game, coalitions):
    """The values of sampled coalitions: (..., N) bool -> (..., K)."""
    return game[(coalitions.long() << torch.arange(coalitions.shape[-1])).sum(-1)]


def error(estimate, truth):
    return ((estimate - truth).norm() / truth.norm()).item()


def assert_follows(counts, law):
    """Chi-square test at the level 1e-4 (Wilson-Hilferty quantile)."""
    expected = torch.as_tensor(law, dtype=torch.float64) * counts.sum()
    degrees = len(expected) - 1
    critical = degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3
    assert ((counts - expected) ** 2 / expected).sum() < critical


def kernel_law(players):
    weights = [1 / (size * (players - size)) for size in range(1, players)]
    return [weight / sum(weights) for weight in weights]


# --- the sampler


@pytest.mark.parametrize("players", [2, 3, 8, 49, 196])
def test_size_distribution_is_the_kernel_law(players):
    law = size_distribution(players)
    assert law.tolist() == pytest.approx(kernel_law(players), abs=1e-15)
    # Lundberg & Lee's weight of one coalition, times the number of coalitions of that size.
    kernel = torch.tensor(
        [
            math.comb(players, s) * (players - 1) / (math.comb(players, s) * s * (players - s))
            for s in range(1, players)
        ]
    )
    assert torch.allclose(law, (kernel / kernel.sum()).double(), atol=1e-7)


@pytest.mark.parametrize("players", [3, 8, 49])
def test_drawn_sizes_follow_the_law(players):
    drawn = sample_sizes(players, 200_000, seeded())
    assert drawn.dtype == torch.int64
    assert_follows(drawn.bincount(minlength=players)[1:], kernel_law(players))


def test_sizes_of_coalitions_and_complements_follow_the_law():
    sizes = sample_pairs(1, 8, 100_000, seeded())[0].sum(-1)
    for column in (sizes[0::2], sizes[1::2]):
        assert_follows(column.bincount(minlength=8)[1:], kernel_law(8))


@pytest.mark.parametrize("players", [2, 3, 16, 197])
def test_pairs_are_complements_of_one_size_per_batch_never_empty_or_full(players):
    present = sample_pairs(5, players, 40, seeded())
    assert present.dtype == torch.bool
    assert present.shape == (5, 80, players)
    sizes = present.sum(-1)
    assert (sizes == sizes[:1]).all()
    assert sizes.min() >= 1
    assert sizes.max() <= players - 1
    assert (present[:, 0::2] ^ present[:, 1::2]).all()


def test_subsets_of_a_size_are_uniform_and_differ_between_images():
    present = sample_pairs(40_000, 6, 1, seeded(), sizes=torch.tensor([2]))
    masks = (present.long() << torch.arange(6)).sum(-1)
    for column, size in ((0, 2), (1, 4)):
        counts = masks[:, column].bincount(minlength=64)
        assert counts.count_nonzero() == math.comb(6, size)
        assert_follows(counts[counts > 0], [1 / math.comb(6, size)] * math.comb(6, size))


def test_given_sizes_are_used():
    sizes = torch.tensor([1, 7, 3])
    present = sample_pairs(4, 8, 3, seeded(), sizes=sizes)
    assert present[:, 0::2].sum(-1).tolist() == [[1, 7, 3]] * 4


@pytest.mark.parametrize("sizes", [[0], [8], [1, 2]])
def test_sizes_that_make_no_pairs_are_refused(sizes):
    with pytest.raises(ValueError, match=r"1 numbers in 1 \.\. 7"):
        sample_pairs(2, 8, 1, seeded(), sizes=torch.tensor(sizes))


def test_the_seed_decides():
    def draw(seed):
        return sample_pairs(3, 20, 10, seeded(seed))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    generator = seeded()
    assert not torch.equal(sample_pairs(3, 20, 10, generator), sample_pairs(3, 20, 10, generator))


def test_post_hoc_coalitions_have_a_size_per_pair():
    present = sample_paired_coalitions(12, 200, seeded())
    assert present.shape == (200, 12)
    assert (present[0::2] ^ present[1::2]).all()
    assert len(present.sum(-1).unique()) > 5
    for count in (0, 7):
        with pytest.raises(ValueError, match="even"):
            sample_paired_coalitions(12, count, seeded())


def test_one_player_has_no_coalitions():
    for draw in (lambda: size_distribution(1), lambda: sample_pairs(1, 1, 1, seeded())):
        with pytest.raises(ValueError, match="at least 2 players"):
            draw()


# --- exact values


def test_all_coalitions_are_their_bitmasks():
    present = all_coalitions(5)
    assert present.dtype == torch.bool
    assert (present.long() << torch.arange(5)).sum(-1).tolist() == list(range(32))
    with pytest.raises(ValueError, match="at most 16"):
        all_coalitions(17)


@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_incomplete_games_are_refused(count):
    with pytest.raises(ValueError, match=r"2\*\*N"):
        exact_shapley_values(torch.zeros(count, 2))


def test_exact_values_are_the_average_over_all_orders():
    players, game = 5, random_game(5)
    average = torch.zeros(players, 3, dtype=torch.float64)
    for order in itertools.permutations(range(players)):
        coalition = 0
        for player in order:
            average[player] += game[coalition | 1 << player] - game[coalition]
            coalition |= 1 << player
    assert torch.allclose(exact_shapley_values(game), average / math.factorial(players), atol=1e-12)


@pytest.mark.parametrize("players", [1, 2, 7, 12])
def test_exact_values_are_efficient(players):
    game = random_game(players)
    assert torch.allclose(exact_shapley_values(game).sum(0), game[-1] - game[0], atol=1e-10)


def test_dummy_symmetric_and_linear_players():
    present = all_coalitions(6)
    game = random_game(6)
    dummy = game[torch.arange(64) & 0b111011]  # player 2 changes nothing
    assert exact_shapley_values(dummy)[2].abs().max() < 1e-12
    swapped = present[:, [0, 4, 2, 3, 1, 5]]
    symmetric = game + look_up(game, swapped)  # players 1 and 4 are exchangeable
    values = exact_shapley_values(symmetric)
    assert torch.allclose(values[1], values[4], atol=1e-12)
    shares = torch.randn(6, 3, generator=seeded(), dtype=torch.float64)
    assert torch.allclose(exact_shapley_values(present.double() @ shares + 7), shares, atol=1e-12)


def test_exact_values_keep_further_dimensions():
    game = random_game(4, classes=6)
    values = exact_shapley_values(game.float().reshape(16, 2, 3))
    assert values.dtype == torch.float64
    assert torch.allclose(values.reshape(4, 6), exact_shapley_values(game), atol=1e-5)


# --- KernelSHAP


def estimate(game, count, seed=0):
    players = len(game).bit_length() - 1
    coalitions = sample_paired_coalitions(players, count, seeded(seed))
    arguments = coalitions, look_up(game, coalitions), game[0], game[-1]
    return kernel_shap(*arguments), kernel_shap_error(*arguments)


@pytest.mark.parametrize("count", [4, 16, 64, 1024])
def test_kernel_shap_is_efficient_however_few_the_coalitions(count):
    game = 30 * random_game(10)
    values, _ = estimate(game, count)
    assert values.isfinite().all()
    assert torch.allclose(values.sum(0), game[-1] - game[0], rtol=0, atol=1e-9)


def test_kernel_shap_without_information_gives_equal_shares():
    present = torch.tensor([[True, False, False, False], [False, True, True, True]])
    null, full = torch.tensor([1.0]), torch.tensor([9.0])
    values = kernel_shap(present, torch.tensor([[3.0], [7.0]]), null, full)  # as equal shares predict
    assert torch.allclose(values, torch.full((4, 1), 2.0, dtype=torch.float64), atol=1e-12)


def test_kernel_shap_recovers_linear_games():
    shares = torch.randn(9, 2, generator=seeded(), dtype=torch.float64)
    game = all_coalitions(9).double() @ shares - 3
    values, expected_error = estimate(game, 64)
    assert torch.allclose(values, shares, atol=1e-10)
    assert expected_error.max() < 1e-10


def test_kernel_shap_converges_to_the_exact_values():
    game = random_game(8)
    truth = exact_shapley_values(game)
    few, more, many = (
        sum(error(estimate(game, count, seed)[0], truth) for seed in range(8)) / 8 for count in (64, 512, 4096)
    )
    assert many < 0.015
    assert more < few / 2.2  # sqrt(8) = 2.8 in the limit
    assert many < more / 2.2


def test_pairs_are_exact_for_interactions_of_two_and_independent_coalitions_are_not():
    """`v(S) - v(complement)` of such a game is linear in S (Covert & Lee 2021 on why pairing helps)."""
    game = random_game(10, noise=0)
    truth = exact_shapley_values(game)
    assert error(estimate(game, 128)[0], truth) < 1e-9
    coalitions = sample_paired_coalitions(10, 256, seeded())[0::2]
    assert error(kernel_shap(coalitions, look_up(game, coalitions), game[0], game[-1]), truth) > 0.01


def test_kernel_shap_takes_batches_with_own_or_shared_coalitions():
    games = [random_game(6, seed=seed) for seed in range(3)]
    null, full = (torch.stack([game[row] for game in games]) for row in (0, -1))
    shared = sample_paired_coalitions(6, 40, seeded())
    for coalitions in (shared, sample_pairs(3, 6, 20, seeded())):
        own = coalitions.expand(3, 40, 6)
        values = torch.stack([look_up(game, rows) for game, rows in zip(games, own, strict=True)])
        alone = [kernel_shap(*arguments) for arguments in zip(own, values, null, full, strict=True)]
        assert torch.allclose(kernel_shap(coalitions, values, null, full), torch.stack(alone), atol=1e-10)
        assert kernel_shap_error(coalitions, values, null, full).shape == (3, 3)


@pytest.mark.parametrize("count", [256, 2048])
def test_the_estimated_error_is_the_true_one(count):
    game = random_game(10)
    truth = exact_shapley_values(game)
    true, estimated = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for seed in range(20):
        values, expected_error = estimate(game, count, seed)
        true += ((values - truth).norm(dim=0) / truth.norm(dim=0)) ** 2
        estimated += expected_error**2
    assert ((estimated / true).sqrt() - 1).abs().max() < 0.25


def test_the_error_needs_two_halves():
    game = random_game(4)
    coalitions = sample_paired_coalitions(4, 6, seeded())
    with pytest.raises(ValueError, match="multiple of 4"):
        kernel_shap_error(coalitions, look_up(game, coalitions), game[0], game[-1])


# --- other libraries


def numpy_game(game, column=0):
    """A one-class game for shapiq, normalised: rows of booleans -> values."""
    return lambda rows: (look_up(game, torch.as_tensor(rows).bool())[:, column] - game[0, column]).numpy()


def test_exact_values_agree_with_shapiq():
    shapiq = pytest.importorskip("shapiq")
    game = random_game(6)
    computer = shapiq.ExactComputer(n_players=6, game=numpy_game(game))
    theirs = torch.as_tensor(computer("SV").get_n_order_values(1))
    assert torch.allclose(exact_shapley_values(game)[:, 0], theirs, atol=1e-8)


def test_kernel_shap_agrees_with_shapiq_within_the_errors():
    shapiq = pytest.importorskip("shapiq")
    game, budget = random_game(12), 1024
    truth = exact_shapley_values(game)[:, 0]
    ours, expected_error = estimate(game, budget)
    approximator = shapiq.KernelSHAP(n=12, random_state=0)
    theirs = torch.as_tensor(approximator.approximate(budget=budget, game=numpy_game(game)).get_n_order_values(1))
    assert error(ours[:, 0], theirs) < 2 * expected_error[0]
    assert error(ours[:, 0], truth) < 2 * error(theirs, truth)


@pytest.mark.filterwarnings("ignore")
def test_exact_values_and_kernel_shap_agree_with_captum():
    attr = pytest.importorskip("captum.attr")
    game = random_game(5)

    def forward(rows):
        return look_up(game, rows.bool())

    everyone = torch.ones(1, 5)
    theirs = attr.ShapleyValues(forward).attribute(everyone, baselines=0, target=1)[0]
    assert torch.allclose(exact_shapley_values(game)[:, 1], theirs.double(), atol=1e-5)
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    fitted = attr.KernelShap(forward).attribute(everyone, target=1, n_samples=2000, perturbations_per_eval=100)[0]
    assert error(estimate(game, 2000)[0][:, 1], fitted.double()) < 0.05
