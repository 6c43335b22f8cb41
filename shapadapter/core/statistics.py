"""Agreement of estimates with true values, and means with their uncertainty."""

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def relative_l2(estimate: Tensor, truth: Tensor) -> Tensor:
    """The relative error `|estimate - truth| / |truth|` of vectors (..., N) along the last dimension.

    Returns:
        (...) without a unit: 0 is perfect, 1 as bad as all zeros; not finite where the truth is all zero.
    """
    return torch.linalg.vector_norm(estimate - truth, dim=-1) / torch.linalg.vector_norm(truth, dim=-1)


def pearson(estimate: Tensor, truth: Tensor) -> Tensor:
    """The linear correlation of vectors (..., N) along the last dimension (Pearson); leading dimensions broadcast.

    Blind to the offset and the scale of either: for methods whose attributions have no unit.

    Returns:
        (...) float64 in -1 .. 1; nan where one of the two is constant or holds a nan.
    """
    estimate, truth = estimate.double(), truth.double()
    left, right = (vector - vector.mean(dim=-1, keepdim=True) for vector in (estimate, truth))  # (..., N)
    norms = torch.linalg.vector_norm(left, dim=-1) * torch.linalg.vector_norm(right, dim=-1)  # (...)
    correlation = ((left * right).sum(dim=-1) / norms).clamp(-1, 1)  # (..., N) -> (...)
    # A constant vector minus its mean is not always zero: the mean is rounded.
    return correlation.masked_fill(is_constant(estimate) | is_constant(truth), torch.nan)


def spearman(estimate: Tensor, truth: Tensor) -> Tensor:
    """The rank correlation of vectors along the last dimension (Spearman): `pearson` of the ranks, ties averaged."""
    return pearson(_average_ranks(estimate), _average_ranks(truth))


def top_k_overlap(estimate: Tensor, truth: Tensor, k: int) -> Tensor:
    """The share of the `k` largest entries of the truth that are among the `k` largest of the estimate.

    Where entries tie for the last places, the mean over every way to break the ties is taken. So a constant estimate
    gets `k / N`, what chance gets. Vectors are (..., N); leading dimensions broadcast.

    Returns:
        (...) float64 share in 0 .. 1; nan where one of the two holds a nan.

    Raises:
        ValueError: `k` is not in 1 .. N.
    """
    players = truth.shape[-1]
    if not 1 <= k <= players:
        raise ValueError(f"k must be in 1 .. {players}, the number of players, but got {k}.")
    return (_share_in_top(estimate, k) * _share_in_top(truth, k)).sum(dim=-1) / k  # (..., N) -> (...)


def is_constant(vectors: Tensor) -> Tensor:
    """Which vectors along the last dimension have equal entries only, exactly: (..., N) to (...) bool."""
    return vectors.amin(dim=-1) == vectors.amax(dim=-1)  # (..., N) -> (...)


@dataclass(frozen=True)
class EquivalentEvaluations:
    """The number of model evaluations with which KernelSHAP has a given error.

    Attributes:
        evaluations: The number, or the end of the measured range that bounds it.
        bound: "<" if KernelSHAP is better with its smallest measured budget already, ">" if it is still worse with
            its largest, "=" in between.
    """

    evaluations: float
    bound: Literal["<", "=", ">"] = "="

    def __str__(self) -> str:
        prefix = "" if self.bound == "=" else f"{self.bound} "
        return f"{prefix}{round(self.evaluations)}"


def equivalent_evaluations(error: float, budgets: Sequence[int], errors: Sequence[float]) -> EquivalentEvaluations:
    """The KernelSHAP budget whose error equals a given one, interpolated between measured budgets.

    Interpolated on logarithmic axes, on which the error of a Monte Carlo estimate falls in a straight line. Where a
    measured error rises with the budget, by chance, the smaller one before it stands.

    Args:
        error: The error to match, e.g. the mean relative L2 error of the one-pass attributions.
        budgets: Measured budgets in evaluations per image, rising.
        errors: The error of KernelSHAP with each budget, in the unit of `error`.

    Raises:
        ValueError: The budgets do not rise from 1 or more, there is not one error for each, or an error is negative or
            not finite.
    """
    if not budgets or len(budgets) != len(errors):
        raise ValueError(f"expected one error for each of one or more budgets, got {len(budgets)} and {len(errors)}.")
    if budgets[0] < 1 or any(low >= high for low, high in itertools.pairwise(budgets)):
        raise ValueError(f"budgets must rise from 1 or more, but got {list(budgets)}.")
    if not all(math.isfinite(value) and value >= 0 for value in (error, *errors)):
        raise ValueError(f"errors must be finite and not negative, but got {error} to match with {list(errors)}.")
    falling = list(itertools.accumulate(errors, min))
    reached = next((place for place, value in enumerate(falling) if value <= error), None)
    if reached is None:
        return EquivalentEvaluations(budgets[-1], ">")
    if reached == 0:
        return EquivalentEvaluations(budgets[0], "=" if error == falling[0] else "<")
    # An error of exactly zero has no logarithm.
    start, stop, here = (math.log(max(e, sys.float_info.min)) for e in (falling[reached - 1], falling[reached], error))
    low, high = math.log(budgets[reached - 1]), math.log(budgets[reached])
    return EquivalentEvaluations(math.exp(low + (high - low) * (here - start) / (stop - start)))


def _average_ranks(vectors: Tensor) -> Tensor:
    """Ranks along the last dimension, 0 to N - 1, equal entries sharing the mean of theirs: (..., N) -> (..., N)."""
    vectors = vectors.double().contiguous()
    ascending = vectors.sort(dim=-1).values  # (..., N)
    below = torch.searchsorted(ascending, vectors)  # (..., N): how many are smaller
    upto = torch.searchsorted(ascending, vectors, right=True)  # (..., N): how many are not larger
    return ((below + upto - 1).double() / 2).masked_fill(vectors.isnan(), torch.nan)


def _share_in_top(vectors: Tensor, k: int) -> Tensor:
    """How often each entry is among the k largest when ties are broken at random: (..., N) -> (..., N)."""
    last = vectors.topk(k, dim=-1).values[..., -1:]  # (..., 1): the k-th largest
    above, equal = (vectors > last).double(), (vectors == last).double()  # (..., N)
    left = k - above.sum(dim=-1, keepdim=True)  # (..., 1): the places for which the equal ones draw lots
    share = above + equal * left / equal.sum(dim=-1, keepdim=True)  # (..., N)
    return share.masked_fill(vectors.isnan().any(dim=-1, keepdim=True), torch.nan)


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval, in the unit of the values.

    Attributes:
        mean: The mean of the values; nan if there are none.
        low: The lower end; nan if there are fewer than two values, or groups, to draw from.
        high: The upper end; nan as `low`.
        count: How many values the mean is of.
    """

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        """Mean and half the width, to two digits of the latter: "0.412 ± 0.031"."""
        half = (self.high - self.low) / 2
        if not (math.isfinite(self.mean) and math.isfinite(half) and half > 0):
            return f"{self.mean:.3g} ± {half:.2g}"
        digits = 1 - math.floor(math.log10(half))
        if digits > 6:
            return f"{self.mean:.2e} ± {half:.1e}"
        return f"{self.mean:.{max(digits, 0)}f} ± {half:.{max(digits, 0)}f}"


def bootstrap_interval(
    values: Tensor, groups: Tensor | None = None, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> Interval:
    """The mean of one number per image, with a percentile bootstrap interval (Efron & Tibshirani 1993).

    Images are drawn again with replacement, or whole groups where images are alike (frames of a film, photographs of
    one animal): then as many groups as there are. For the difference of two methods on the same images, pass the
    differences: the interval of a paired comparison is much the narrower.

    Args:
        values: (R,) numbers, one per image. A nan (the measure does not apply to this image) is left out.
        groups: (R,) int, which group each image belongs to; by default each is its own.
        level: The confidence, between 0 and 1.
        draws: How many times to draw.
        seed: Seed of the draws: the same values give the same interval.

    Raises:
        ValueError: `values` is no vector, `groups` does not fit it, the level is not between 0 and 1, or there are no
            draws.
    """
    if values.ndim != 1:
        raise ValueError(
            f"expected one value per image, (R,), got shape {tuple(values.shape)}: `bootstrap_intervals`?"
        )
    return bootstrap_intervals(values[:, None], groups, level, draws, seed)[0]  # (R,) -> (R, 1)


def bootstrap_intervals(
    values: Tensor, groups: Tensor | None = None, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> list[Interval]:
    """`bootstrap_interval` of each column of (R, P), all with the same draws; for the points of a mean curve.

    Raises:
        ValueError: `values` is no matrix, or as for `bootstrap_interval`.
    """
    if values.ndim != 2:
        raise ValueError(f"values must be (R, P), a row for each image, got shape {tuple(values.shape)}.")
    if groups is not None and groups.shape != values.shape[:1]:
        raise ValueError(f"groups must be ({len(values)},), one for each image, got shape {tuple(groups.shape)}.")
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"expected a level between 0 and 1 and at least one draw, got {level} and {draws}.")
    sums, counts = _sums_of_groups(values.detach().double().cpu(), groups)  # (G, P) each
    means = sums.sum(dim=0) / counts.sum(dim=0)  # (G, P) -> (P,)
    low = high = torch.full_like(means, torch.nan)  # (P,)
    if len(sums) > 1:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(sums), (draws, len(sums)), generator=generator, device="cpu")  # (draws, G)
        often = torch.ones_like(drawn, dtype=torch.float64)
        chosen = torch.zeros_like(often).scatter_add_(1, drawn, often)  # (draws, G), how often each group was drawn
        means_drawn = (chosen @ sums) / (chosen @ counts)  # (draws, G) @ (G, P) -> (draws, P)
        ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device="cpu")  # (2,)
        low, high = means_drawn.nanquantile(ends, dim=0)  # (draws, P) -> (2, P) -> (P,) each
    alone = (counts > 0).sum(dim=0) < 2  # (P,): nothing left to draw from
    low, high = low.masked_fill(alone, torch.nan), high.masked_fill(alone, torch.nan)
    columns = zip(means.tolist(), low.tolist(), high.tolist(), counts.sum(dim=0).tolist(), strict=True)
    return [Interval(mean, start, end, int(count)) for mean, start, end, count in columns]


def _sums_of_groups(values: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum of the values of each group and how many are not nan: (R, P) -> (G, P), (G, P)."""
    known = (~values.isnan()).double()  # (R, P)
    values = values.masked_fill(values.isnan(), 0)
    if groups is None:
        return values, known
    names, index = groups.cpu().unique(return_inverse=True)  # (G,), (R,)
    empty = torch.zeros(len(names), values.shape[1], dtype=torch.float64, device="cpu")  # (G, P)
    return empty.index_add(0, index, values), empty.index_add(0, index, known)
