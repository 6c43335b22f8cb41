"""From records of images to means with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shapadapter.core.statistics import EquivalentEvaluations, Interval, bootstrap_intervals, equivalent_evaluations
from shapadapter.evaluation.records import Record
from shapadapter.evaluation.result import Equivalent

DRAWS = 1000
_NUMBERS_AT_ONCE = 10_000_000


def mean_of(values: Tensor, groups: Tensor | None, seed: int) -> Interval:
    """The mean of one number per image (R,)."""
    return intervals(values[:, None], groups, seed)[0]


def intervals(values: Tensor, groups: Tensor | None, seed: int) -> list[Interval]:
    """The means of columns (R, P), all from the same draws; of very many images fewer draws, which then do."""
    draws = min(DRAWS, max(100, _NUMBERS_AT_ONCE // len(values)))
    return bootstrap_intervals(values, groups, draws=draws, seed=seed)


def by_name(records: Sequence[Mapping[str, Any]], groups: Tensor | None, seed: int) -> dict[str, Interval]:
    """The means of named numbers, one mapping for each image; a number that is missing or None is left out."""
    names = list(dict.fromkeys(name for record in records for name in record))
    if not names:
        return {}
    values = torch.tensor(
        [[_number(record.get(name)) for name in names] for record in records], dtype=torch.float64, device="cpu"
    )
    means = intervals(values, groups, seed)  # (R, P) -> P
    return {name: mean for name, mean in zip(names, means, strict=True) if mean.count}


def per_method(
    records: Sequence[Record], groups: Tensor | None, seed: int, key: str = "methods"
) -> dict[str, dict[str, Interval]]:
    """The means of every measure of every method."""
    names = list(dict.fromkeys(name for record in records for name in record[key]))
    return {name: by_name([record[key].get(name, {}) for record in records], groups, seed) for name in names}


def mean_curves(
    records: Sequence[Record], groups: Tensor | None, seed: int
) -> dict[str, dict[str, tuple[Interval, ...]]]:
    """The mean curves of every method, an interval at each point."""
    curves: dict[str, dict[str, tuple[Interval, ...]]] = {}
    for method in records[0]["curves"]:
        for name in records[0]["curves"][method]:
            lines = [[_number(point) for point in record["curves"][method][name]] for record in records]
            values = torch.tensor(lines, dtype=torch.float64, device="cpu")  # (R, P)
            curves.setdefault(method, {})[name] = tuple(intervals(values, groups, seed))
    return curves


def equivalent(
    records: Sequence[Record], method: str, budgets: Sequence[int], groups: Tensor | None, seed: int
) -> Equivalent | None:
    """The KernelSHAP budget whose mean error is that of a method, bootstrapped over images; None without errors."""
    own = [_number(record["methods"][method].get("error")) for record in records]
    ladder = [[_number(value) for value in record["kernel_shap"]] for record in records]
    values = torch.tensor(
        [[one, *rest] for one, rest in zip(own, ladder, strict=True)], dtype=torch.float64, device="cpu"
    )
    known = values.isfinite().all(dim=1)  # (R,)
    if not bool(known.any()):
        return None
    values = values[known]  # (r, 1 + budgets)
    names = torch.arange(len(values), device="cpu") if groups is None else groups[known].unique(return_inverse=True)[1]
    count = int(names.max()) + 1
    sums = torch.zeros(count, values.shape[1], dtype=torch.float64, device="cpu").index_add(
        0, names, values
    )  # (G, 1 + budgets)
    sizes = torch.zeros(count, dtype=torch.float64, device="cpu").index_add(
        0, names, torch.ones(len(values), device="cpu").double()
    )
    best = _budget(values.mean(dim=0), budgets)
    if count < 2:
        return Equivalent(best.evaluations, best.bound, math.nan, math.nan)
    chosen = torch.randint(
        count, (DRAWS, count), generator=torch.Generator().manual_seed(seed), device="cpu"
    )  # (draws, G)
    means = sums[chosen].sum(dim=1) / sizes[chosen].sum(dim=1, keepdim=True)  # (draws, 1 + budgets)
    drawn = torch.tensor([_budget(mean, budgets).evaluations for mean in means], dtype=torch.float64, device="cpu")
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64, device="cpu")).tolist()
    return Equivalent(best.evaluations, best.bound, low, high)


def _budget(means: Tensor, budgets: Sequence[int]) -> EquivalentEvaluations:
    """From the mean errors (1 + budgets,) of a method and of each budget."""
    error, *ladder = means.tolist()
    return equivalent_evaluations(error, budgets, ladder)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
