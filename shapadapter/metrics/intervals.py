"""A mean with its uncertainty: bootstrap intervals over images, or over groups of images."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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

    Returns:
        The mean of what was not nan, the interval, and how many values these are.

    Raises:
        ValueError: If `values` is no vector, `groups` does not fit it, the level is not between 0 and 1, or there are
            no draws.
    """
    if values.ndim != 1:
        raise ValueError(
            f"expected one value per image, (R,), got shape {tuple(values.shape)}: `bootstrap_intervals`?"
        )
    return bootstrap_intervals(values[:, None], groups, level, draws, seed)[0]  # (R,) -> (R, 1)


def bootstrap_intervals(
    values: Tensor, groups: Tensor | None = None, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> list[Interval]:
    """`bootstrap_interval` of each column, all with the same draws; for the points of a mean curve.

    Args:
        values: (R, P) P numbers per image. Each nan is left out.
        groups: (R,) int, which group each image belongs to; by default each is its own.
        level: The confidence of each interval by itself, between 0 and 1.
        draws: How many times to draw.
        seed: Seed of the draws.

    Returns:
        P intervals.

    Raises:
        ValueError: If `values` is no matrix, `groups` does not fit it, the level is not between 0 and 1, or there are
            no draws.
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
        chosen = _draw_with_replacement(len(sums), draws, seed)  # (draws, G)
        drawn = (chosen @ sums) / (chosen @ counts)  # (draws, G) @ (G, P) -> (draws, P)
        ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device="cpu")  # (2,)
        low, high = drawn.nanquantile(ends, dim=0)  # (draws, P) -> (2, P) -> (P,) each
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


def _draw_with_replacement(count: int, draws: int, seed: int) -> Tensor:
    """How often each of `count` things comes up in `count` draws with replacement: (draws, count) float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (draws, count), generator=generator, device="cpu")  # (draws, count)
    return torch.zeros(draws, count, dtype=torch.float64, device="cpu").scatter_add_(
        1, drawn, torch.ones_like(drawn).double()
    )
