"""Agreement with the truth: against scipy, and on vectors whose answer is known."""

import pytest
import torch
from scipy import stats

from shapadapter.core.statistics import (
    EquivalentEvaluations,
    equivalent_evaluations,
    pearson,
    relative_l2,
    spearman,
    top_k_overlap,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_relative_error():
    truth = normal(2, 3, 8)
    assert relative_l2(truth, truth).tolist() == [[0] * 3] * 2
    assert torch.allclose(relative_l2(torch.zeros_like(truth), truth), torch.ones(2, 3).double())
    assert torch.allclose(relative_l2(7 * 1.1 * truth, 7 * truth), torch.full((2, 3), 0.1).double())
    assert relative_l2(torch.tensor([3.0, 0]), torch.tensor([3.0, 4])).item() == pytest.approx(0.8)
    assert not relative_l2(truth, torch.zeros_like(truth)).isfinite().any()


def test_correlations_equal_scipys():
    estimate, truth = normal(3, 4, 30), normal(3, 4, 30, seed=1)
    tied = (3 * estimate).round()  # many entries are equal
    assert (tied[0, 0].unique().numel()) < 25
    for left in (estimate, estimate + truth, tied, estimate.float()):
        linear, ranks = pearson(left, truth), spearman(left, truth)
        assert linear.shape == ranks.shape == (3, 4)
        for row in range(3):
            for col in range(4):
                pair = left[row, col].numpy(), truth[row, col].numpy()
                assert linear[row, col].item() == pytest.approx(stats.pearsonr(*pair).statistic, abs=1e-7)
                assert ranks[row, col].item() == pytest.approx(stats.spearmanr(*pair).statistic, abs=1e-12)


def test_correlations_ask_for_no_unit_and_ranks_for_the_order_alone():
    truth = normal(5, 16)
    assert torch.allclose(pearson(7 * truth - 3, truth), torch.ones(5).double())
    assert torch.allclose(pearson(-truth, truth), -torch.ones(5).double())
    assert torch.allclose(spearman(truth.exp(), truth), torch.ones(5).double())
    assert (pearson(truth.exp(), truth) < 0.99).all()
    assert torch.equal(
        pearson(truth, truth[0]), pearson(truth, truth[:1].expand(5, 16))
    )  # leading dimensions broadcast


@pytest.mark.parametrize("measure", [pearson, spearman])
def test_correlation_with_a_constant_or_a_nan_is_nan(measure):
    truth = normal(2, 49)
    assert measure(torch.full_like(truth, 0.1), truth).isnan().all()  # 0.1 minus its rounded mean is not zero
    assert measure(truth, torch.full((49,), 1 / 3)).isnan().all()
    broken = truth.clone()
    broken[0, 3] = torch.nan
    assert measure(broken, truth).isnan().tolist() == [True, False]


def test_top_k_overlap_counts_the_shared_entries():
    truth = torch.tensor([5.0, 4, 3, 2, 1, 0])
    estimate = torch.tensor([5.0, 0, 3, 4, -9, 1])
    assert [top_k_overlap(estimate, truth, k).item() for k in (1, 2, 3, 6)] == [1, 0.5, pytest.approx(2 / 3), 1]
    assert top_k_overlap(-truth, truth, 3).item() == 0
    assert top_k_overlap(normal(3, 1, 9), normal(4, 9), 2).shape == (3, 4)


def test_top_k_overlap_of_ties_is_the_mean_over_every_way_to_break_them():
    truth = normal(3, 10)
    assert torch.allclose(top_k_overlap(torch.zeros(10), truth, 4), torch.full((3,), 0.4).double())
    tied = torch.tensor([1.0, 1, 1, 0, 2])
    truth = torch.tensor([9.0, 8, 0, 0.5, 0.1])
    rank = torch.rand(20_000, 5, generator=torch.Generator().manual_seed(0)) * 1e-3
    assert top_k_overlap(tied, truth, 2).item() == pytest.approx(1 / 3)  # player 4, and one of 0, 1, 2
    assert top_k_overlap(tied + rank, truth, 2).mean().item() == pytest.approx(1 / 3, abs=0.01)


def test_top_k_overlap_refuses_and_passes_nan_on():
    for k in (0, 5):
        with pytest.raises(ValueError, match=r"1 \.\. 4"):
            top_k_overlap(torch.zeros(4), torch.zeros(4), k)
    assert top_k_overlap(torch.tensor([1, torch.nan, 0]), torch.tensor([1.0, 2, 3]), 1).isnan()


BUDGETS = [64, 256, 1024]


def test_a_power_law_is_interpolated_exactly():
    errors = [8 / budget**0.5 for budget in BUDGETS]
    for budget in (64, 100, 256, 777, 1024):
        found = equivalent_evaluations(8 / budget**0.5, BUDGETS, errors)
        assert found.bound == "="
        assert found.evaluations == pytest.approx(budget)
        assert str(found) == str(budget)


def test_outside_of_what_was_measured_there_is_a_bound():
    errors = [0.4, 0.2, 0.1]
    assert str(equivalent_evaluations(0.5, BUDGETS, errors)) == "< 64"
    assert str(equivalent_evaluations(0.05, BUDGETS, errors)) == "> 1024"
    assert equivalent_evaluations(0.4, BUDGETS, errors) == EquivalentEvaluations(64, "=")
    assert equivalent_evaluations(0.1, BUDGETS, errors) == EquivalentEvaluations(pytest.approx(1024), "=")
    assert str(equivalent_evaluations(0.3, [128], [0.2])) == "< 128"


def test_errors_that_rise_by_chance_are_held_down():
    assert equivalent_evaluations(0.2, [10, 20, 40, 80], [0.4, 0.2, 0.3, 0.1]).evaluations == pytest.approx(20)
    between = equivalent_evaluations(0.15, [10, 20, 40, 80], [0.4, 0.2, 0.3, 0.1]).evaluations
    assert 40 < between < 80  # the error of 40 counts as 0.2
    assert str(equivalent_evaluations(0.15, [10, 20, 40], [0.4, 0.2, 0.3])) == "> 40"


def test_an_exact_rival_is_finite():
    assert equivalent_evaluations(0.0, [10, 20], [0.5, 0.0]).evaluations == pytest.approx(20)
    assert 10 < equivalent_evaluations(0.2, [10, 20], [0.5, 0.0]).evaluations < 20


def test_equivalent_evaluations_refuses_what_is_no_measurement():
    for budgets, errors in (([], []), ([1, 2], [0.1])):
        with pytest.raises(ValueError, match="one error for each"):
            equivalent_evaluations(0.1, budgets, errors)
    for budgets in ([2, 1], [0, 1], [4, 4]):
        with pytest.raises(ValueError, match="rise"):
            equivalent_evaluations(0.1, budgets, [0.2, 0.1])
    for error in (float("nan"), -0.1, float("inf")):
        with pytest.raises(ValueError, match="finite"):
            equivalent_evaluations(error, [1], [0.1])
        with pytest.raises(ValueError, match="finite"):
            equivalent_evaluations(0.1, [1], [error])
