"""The bootstrap covers the truth as often as it says."""

import math
from dataclasses import astuple

import pytest
import torch
from scipy import stats

from shapadapter.core.statistics import Interval, bootstrap_interval, bootstrap_intervals


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_coverage_on_normal_data():
    covered = [
        interval.low < 0.7 < interval.high
        for interval in bootstrap_intervals(0.7 + 2 * normal(80, 1000), draws=500)  # each column an experiment
    ]
    assert 0.92 <= sum(covered) / 1000 <= 0.97


def test_coverage_over_groups_that_are_alike():
    """40 groups of 5 alike images: drawing images would find five times the information there is."""
    groups = torch.arange(40).repeat_interleave(5)
    values = normal(40, 600).repeat_interleave(5, dim=0) + 0.1 * normal(200, 600, seed=1)

    def coverage(groups):
        intervals = bootstrap_intervals(values, groups, draws=300)
        return sum(interval.low < 0 < interval.high for interval in intervals) / 600

    assert coverage(groups) > 0.91
    assert coverage(None) < 0.75


def test_the_interval_is_near_scipys_and_students():
    values = 3 + normal(200)
    ours = bootstrap_interval(values, draws=5000, level=0.9)
    theirs = stats.bootstrap(
        (values.numpy(),), lambda x, axis: x.mean(axis), method="percentile", confidence_level=0.9
    )
    assert ours.mean == pytest.approx(values.mean().item())
    assert ours.count == 200
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.01)
    half = stats.t.ppf(0.95, 199) * values.std().item() / 200**0.5
    assert (ours.high - ours.low) / 2 == pytest.approx(half, rel=0.05)


def test_groups_are_drawn_whole():
    values, groups = torch.tensor([1.0, 1, 1, 5]), torch.tensor([7, 7, 7, -2])
    interval = bootstrap_interval(values, groups)
    assert interval == Interval(mean=2, low=1, high=5, count=4)  # two groups: only 1, 2 or 5 can be drawn
    assert bootstrap_interval(values, torch.arange(4)) == bootstrap_interval(values)


def test_the_seed_decides():
    values = normal(50)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    assert bootstrap_interval(values, level=0.5).low > bootstrap_interval(values, level=0.99).low


def test_nan_is_left_out():
    values = normal(60)
    values[::3] = torch.nan
    interval = bootstrap_interval(values)
    assert interval.count == 40
    assert interval.mean == pytest.approx(values.nanmean().item())
    assert math.isfinite(interval.low)
    assert math.isfinite(interval.high)
    assert interval.low < interval.mean < interval.high


def test_columns_are_intervals_of_their_own():
    values = normal(30, 4)
    values[:10, 2] = torch.nan
    for column, interval in zip(values.T, bootstrap_intervals(values), strict=True):
        alone = bootstrap_interval(column)
        assert astuple(interval) == pytest.approx(astuple(alone))
        assert interval.count == column.isfinite().sum()


@pytest.mark.parametrize("values", [[], [math.nan, math.nan], [0.5], [0.5, math.nan]])
def test_too_little_to_draw_from(values):
    interval = bootstrap_interval(torch.tensor(values))
    assert interval.count == sum(not math.isnan(value) for value in values)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert interval.mean == 0.5 if interval.count else math.isnan(interval.mean)
    assert "± nan" in str(interval)


def test_one_group_has_no_interval():
    interval = bootstrap_interval(normal(9), torch.zeros(9, dtype=torch.long))
    assert math.isnan(interval.low)


def test_bools_and_low_precision_are_averaged_too():
    assert bootstrap_interval(torch.tensor([True, False, True, True])).mean == 0.75
    assert bootstrap_interval(torch.full((3000,), 1.0, dtype=torch.float16)).mean == 1


@pytest.mark.parametrize(
    ("mean", "half", "text"),
    [
        (0.41234, 0.0311, "0.412 ± 0.031"),
        (310.4, 20.2, "310 ± 20"),
        (12345.6, 678.9, "12346 ± 679"),
        (-0.5, 0.123, "-0.50 ± 0.12"),
        (2.5e-7, 1.2e-8, "2.50e-07 ± 1.2e-08"),
        (0.75, 0.0, "0.75 ± 0"),
    ],
)
def test_an_interval_reads_as_mean_and_half_width(mean, half, text):
    assert str(Interval(mean, mean - half, mean + half, 9)) == text


def test_it_refuses_what_it_cannot_draw_from():
    with pytest.raises(ValueError, match="one value per image"):
        bootstrap_interval(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="a row for each image"):
        bootstrap_intervals(torch.zeros(3))
    with pytest.raises(ValueError, match=r"groups must be \(3,\)"):
        bootstrap_interval(torch.zeros(3), torch.zeros(2))
    for level, draws in ((0, 10), (1, 10), (0.9, 0)):
        with pytest.raises(ValueError, match="level between 0 and 1"):
            bootstrap_interval(torch.zeros(3), level=level, draws=draws)
