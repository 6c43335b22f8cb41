"""Laws of the Shapley objective: what it is minimised by, what it is free of and where gradients flow."""

import math

import pytest
import torch

from shapadapter.core.estimates import exact_shapley_values
from shapadapter.core.shapley import (
    all_coalitions,
    coalition_fit,
    coalition_sums,
    contrastive_loss,
    expected_square,
    pairwise_sigmoid_loss,
    project_on_efficiency,
    sample_pairs,
    shapley_loss,
    size_distribution,
    warmup_weight,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def expected_coalitions(players):
    """The kernel law as a list: each coalition as often as its probability says, (1, M, N)."""
    present = all_coalitions(players)[1:-1]
    rarity = [size * (players - size) * math.comb(players, size) for size in range(1, players)]
    copies = torch.tensor([0, *(math.lcm(*rarity) // rare for rare in rarity)])
    return present.repeat_interleave(copies[present.sum(-1)], dim=0)[None]


def look_up(game, coalitions):
    return game[(coalitions.long() << torch.arange(coalitions.shape[-1])).sum(-1)]


def minimise(game, start):
    """Free attributions (1, N, K) under efficiency that minimise the expected Shapley loss of a game."""
    players = start.shape[1]
    coalitions = expected_coalitions(players)
    values, null, full = look_up(game, coalitions), game[None, 0], game[None, -1]
    raw = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([raw], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        attributions = project_on_efficiency(raw, full, null)
        # The yardstick moves along without a gradient, which a line search would take for a mistake.
        loss = shapley_loss(attributions, coalitions, values, null) * expected_square(attributions)
        loss.backward()
        return loss

    optimiser.step(closure)
    return project_on_efficiency(raw.detach(), full, null)[0]


def example(batch=3, players=7, pairs=5, classes=4, dtype=torch.float32):
    coalitions = sample_pairs(batch, players, pairs, seeded())
    shapes = (batch, players, classes), (batch, 2 * pairs, classes), (batch, classes)
    attributions, values, null = (normal(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes))
    return attributions, coalitions, values, null


# --- the minimiser


@pytest.mark.parametrize("players", [2, 3, 6, 10])
def test_the_minimiser_is_the_shapley_value(players):
    game = normal(2**players, 3, dtype=torch.float64)
    found = minimise(game, normal(1, players, 3, seed=1, dtype=torch.float64))
    assert (found - exact_shapley_values(game)).abs().max() < 1e-3


def test_the_minimiser_knows_dummies_symmetry_and_linear_games():
    players, start = 5, normal(1, 5, 3, seed=1, dtype=torch.float64)
    game = normal(32, 3, dtype=torch.float64)
    dummy = game[torch.arange(32) & 0b10111]
    assert minimise(dummy, start)[3].abs().max() < 1e-3
    symmetric = game + look_up(game, all_coalitions(players)[:, [1, 0, 2, 3, 4]])
    found = minimise(symmetric, start)
    assert torch.allclose(found[0], found[1], atol=1e-3)
    shares = normal(5, 3, seed=2, dtype=torch.float64)
    assert torch.allclose(minimise(all_coalitions(players).double() @ shares + 4, start), shares, atol=1e-3)


# --- the loss


def kernel_law(players):
    """Probability of each coalition (2^N,) float64; 0 of the empty and the full one."""
    sizes = all_coalitions(players).sum(dim=1)  # (2^N,)
    law = [0, *size_distribution(players).tolist(), 0]
    return torch.tensor([law[size] / math.comb(players, size) for size in sizes.tolist()], dtype=torch.float64)


def test_sums_residuals_and_loss_by_hand():
    attributions = torch.tensor([[[1.0], [2.0], [4.0]]])
    coalitions = torch.tensor([[[True, False, True], [False, True, False]]])
    values, null = torch.tensor([[[16.0], [11.0]]]), torch.tensor([[10.0]])
    assert coalition_sums(attributions, coalitions).flatten().tolist() == [5, 2]
    # Of three players one or two are present, each alone or left out as often: (1 + 4 + 16 + 36 + 25 + 9) / 6.
    assert expected_square(attributions).item() == pytest.approx(91 / 6)
    assert shapley_loss(attributions, coalitions, values, null).item() == pytest.approx(6 / 91)


def test_the_yardstick_is_the_mean_square_under_the_kernel_law():
    attributions = normal(2, 6, 3)
    law = kernel_law(6)  # (64,)
    squares = (coalition_sums(attributions, all_coalitions(6).expand(2, -1, -1)) ** 2).mean(dim=2)  # (2, 64)
    assert torch.allclose(expected_square(attributions).double(), squares.double() @ law)


@pytest.mark.parametrize("players", [3, 6, 8])
def test_one_pair_at_a_time_leads_to_the_shapley_value_too(players):
    """In expectation over single pairs, as training draws them, the loss has no slope at the Shapley value."""
    game = normal(2**players, 3, dtype=torch.float64)
    truth = exact_shapley_values(game)  # (N, K)
    coalitions = all_coalitions(players)  # (2^N, N)
    pairs = torch.stack([coalitions, ~coalitions], dim=1)  # (2^N, 2, N): each its own image
    values = torch.stack([game, game.flip(0)], dim=1)  # (2^N, 2, K)
    slopes = []
    for attributions in (truth, truth + 0.1 * normal(players, 1, seed=3, dtype=torch.float64)):
        copies = attributions.expand(2**players, -1, -1).clone().requires_grad_()
        each = [
            shapley_loss(copies[i : i + 1], pairs[i : i + 1], values[i : i + 1], game[:1]) for i in range(2**players)
        ]
        (torch.stack(each) @ kernel_law(players)).backward()
        slope = copies.grad.sum(dim=0)  # (N, K)
        slopes.append((slope - slope.mean(dim=0)).abs().max().item())  # within the efficiency plane
    assert slopes[0] < 1e-9 < 1e-3 < slopes[1]


def test_the_loss_is_free_of_scale_and_shift():
    attributions, coalitions, values, null = example()
    loss = shapley_loss(attributions, coalitions, values, null)
    assert torch.allclose(shapley_loss(50 * attributions, coalitions, 50 * values, 50 * null), loss, rtol=1e-4)
    assert torch.allclose(shapley_loss(attributions, coalitions, values + 2, null + 2), loss, rtol=1e-4)


def test_a_silent_model_has_a_finite_loss_and_gradient():
    attributions, coalitions, values, null = example()
    attributions = torch.zeros_like(attributions).requires_grad_()
    loss = shapley_loss(attributions, coalitions, null[:, None].expand_as(values), null)
    loss.backward()
    assert loss.item() == 0
    assert attributions.grad.isfinite().all()


def test_gradients_reach_attributions_and_coalition_values_but_never_the_null():
    attributions, coalitions, values, null = (
        tensor.requires_grad_() if tensor.is_floating_point() else tensor for tensor in example()
    )
    shapley_loss(attributions, coalitions, values, null).backward()
    assert attributions.grad.abs().max() > 0
    assert values.grad.abs().max() > 0
    assert null.grad is None
    sums = coalition_sums(attributions, coalitions)
    assert not coalition_fit(sums, coalitions, values, null, null + 1)[0].requires_grad


def test_the_divisor_has_no_gradient():
    attributions, coalitions, _, null = example()
    attributions.requires_grad_()
    values = null[:, None].expand(-1, coalitions.shape[1], -1)  # a game in which nothing is gained
    loss = shapley_loss(attributions, coalitions, values, null)
    loss.backward()
    assert (attributions.grad * attributions).sum().item() == pytest.approx(2 * loss.item(), rel=1e-5)  # else 0


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_lifted_before_anything_is_summed(autocast):
    low = [tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in example(players=64)]
    high = [tensor.double() if tensor.is_floating_point() else tensor for tensor in low]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, sums = shapley_loss(*low), coalition_sums(low[0], low[1])
        projected = project_on_efficiency(low[0], low[3] + 3, low[3])
    assert loss.dtype == sums.dtype == projected.dtype == torch.float32
    assert torch.allclose(loss.double(), shapley_loss(*high), rtol=1e-5)
    assert torch.allclose(sums.double(), coalition_sums(high[0], high[1]), atol=1e-5)
    target = (low[3] + 3).double() - high[3]
    assert torch.allclose(projected.double().sum(1), target, atol=1e-5)


# --- the fit


def fit(attributions, coalitions, *values):
    explained, total = coalition_fit(coalition_sums(attributions, coalitions), coalitions, *values)
    return (explained / total).item()


def test_the_fit_is_one_for_the_truth_of_a_linear_game_and_zero_for_equal_shares():
    shares, null = normal(2, 6, 3, dtype=torch.float64), normal(2, 3, seed=1, dtype=torch.float64)
    coalitions = sample_pairs(2, 6, 8, seeded())
    values, full = null[:, None] + coalitions.double() @ shares, null + shares.sum(1)
    equal = shares.mean(1, keepdim=True).expand_as(shares)
    arguments = coalitions, values, null, full
    assert fit(shares, *arguments) == pytest.approx(1)
    assert fit(equal, *arguments) == pytest.approx(0)
    assert fit((shares + equal) / 2, *arguments) == pytest.approx(0.75)
    assert fit(-shares, *arguments) < 0


def test_the_fit_sees_what_a_small_loss_hides():
    """Values that grow with the number of players: equal shares have a tiny loss and no fit."""
    shares = 10 + normal(1, 16, 2)
    coalitions = sample_pairs(1, 16, 50, seeded())
    values, null, full = coalition_sums(shares, coalitions), torch.zeros(1, 2), shares.sum(1)
    equal = shares.mean(1, keepdim=True).expand_as(shares)
    assert shapley_loss(equal, coalitions, values, null) < 0.01
    assert fit(equal, coalitions, values, null, full) == pytest.approx(0, abs=1e-4)


# --- efficiency and warm-up


def test_projection_is_the_nearest_efficient_point():
    raw, full, null = normal(3, 7, 4), normal(3, 4, seed=1), normal(3, 4, seed=2)
    projected = project_on_efficiency(raw, full, null)
    assert torch.allclose(null + projected.sum(1), full, atol=1e-5)
    assert torch.allclose(project_on_efficiency(projected, full, null), projected, atol=1e-6)
    moved = projected - raw
    assert torch.allclose(moved, moved[:, :1].expand_as(moved), atol=1e-6)  # along the normal of the plane


def test_the_weight_rises_linearly_and_stays():
    ramp = [warmup_weight(2.0, progress, 0.4) for progress in (0, 0.1, 0.2, 0.4, 0.7, 1)]
    assert ramp == pytest.approx([0, 0.5, 1, 2, 2, 2])
    assert warmup_weight(2.0, 0, 0) == 2.0


# --- images and texts


def test_one_match_for_each_is_the_loss_of_clip_and_of_siglip():
    similarity = 5 * normal(6, 6)
    alone, own = torch.eye(6, dtype=torch.bool), torch.arange(6)
    entropy = torch.nn.functional.cross_entropy
    clip = (entropy(similarity, own) + entropy(similarity.t(), own)) / 2
    assert torch.allclose(contrastive_loss(similarity, alone), clip)
    signs = 2 * torch.eye(6) - 1
    siglip = -torch.nn.functional.logsigmoid(signs * similarity.t()).sum(dim=-1).mean()  # as in transformers
    assert torch.allclose(pairwise_sigmoid_loss(similarity, alone), siglip)


def test_known_matches_cost_less_than_false_negatives():
    groups = torch.tensor([0, 0, 1, 1, 1, 2])
    matches, alone = groups[:, None] == groups[None], torch.eye(6, dtype=torch.bool)
    similarity = 8 * matches.float() - 4 + 0.1 * normal(6, 6)
    assert pairwise_sigmoid_loss(similarity, matches) < 0.2 * pairwise_sigmoid_loss(similarity, alone)
    assert contrastive_loss(similarity, matches) <= contrastive_loss(similarity, alone) + 0.1
    wrong = similarity.roll(1, dims=1)
    assert contrastive_loss(similarity, matches) < contrastive_loss(wrong, matches)
    assert pairwise_sigmoid_loss(similarity, matches) < pairwise_sigmoid_loss(wrong, matches)


def test_equal_texts_share_the_contrastive_target_without_changing_its_sum():
    """Two columns that are the same get the same log-probabilities, however the target is divided among them."""
    groups = torch.tensor([0, 0, 1, 1, 1, 2])
    matches, alone = groups[:, None] == groups[None], torch.eye(6, dtype=torch.bool)
    similarity = normal(6, 3)[:, groups].requires_grad_()
    shared, own = contrastive_loss(similarity, matches), contrastive_loss(similarity, alone)
    assert torch.allclose(shared, own)
    one, other = (torch.autograd.grad(loss, similarity)[0] for loss in (shared, own))
    # What the texts get in sum, which is what reaches a text that is there twice, is the same.
    assert torch.allclose(one[:, :2].sum(1), other[:, :2].sum(1), atol=1e-6)


def test_images_and_texts_may_differ_in_number():
    similarity = normal(4, 2).requires_grad_()
    matches = torch.tensor([[True, False], [True, False], [False, True], [True, True]])
    for rule in (contrastive_loss, pairwise_sigmoid_loss):
        loss = rule(similarity, matches)
        assert loss.ndim == 0
        loss.backward()
        assert similarity.grad.isfinite().all()


@pytest.mark.parametrize("rule", [contrastive_loss, pairwise_sigmoid_loss])
def test_similarities_in_half_precision_are_lifted(rule):
    low, matches = (50 * normal(8, 8)).bfloat16(), torch.eye(8, dtype=torch.bool)
    assert rule(low, matches).dtype == torch.float32
    assert torch.allclose(rule(low, matches).double(), rule(low.double(), matches), rtol=1e-5)
