"""Error against cost: how near each way comes to the true Shapley values, and how many forward passes its time would buy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from shapadapter.core.errors import UnsupportedModelError
from shapadapter.core.shapley import pays_for_all, seed_of
from shapadapter.core.statistics import Interval, relative_l2
from shapadapter.evaluation.cost import base_alone, seconds_of, with_merged_lora
from shapadapter.evaluation.plan import ONE_PASS, Plan, image_of, images_of
from shapadapter.evaluation.records import Means, Record
from shapadapter.explanation.methods import attribute
from shapadapter.explanation.passes import Predicted, device_of

UNTRAINED = "presence_gradient"
"""The method whose error is the smoothness of the game: in a linear one it is exact, for any head."""

_SINGLE = (ONE_PASS, UNTRAINED, "gradient")
_BUDGETED = ("refined", "kernel_shap", "permutation")

_LABELS = {
    ONE_PASS: "one pass",
    UNTRAINED: "untrained gradient",
    "kernel_shap": "KernelSHAP",
    "permutation": "permutation sampling",
}

_REPEATS = 3  # three times as many of what takes a few passes, whose times spread more
_EVALUATIONS_TIMED = 2048  # in a timed call: of fewer images where each takes many, and only once beyond
_TOGETHER, _TOGETHER_ON_DEVICE = 8, 32  # images in a timed pass; an accelerator is not busy with a few


@dataclass(frozen=True)
class CostPoint:
    """The error of one way to attribute, and its cost.

    Attributes:
        method: a name that `attribute` knows: "shapadapter" (the one pass), "presence_gradient", "gradient", "refined",
            "kernel_shap" or "permutation".
        budget: evaluations for each image that the method was given, 0 where it takes none.
        passes: measured time for an image, in that of a forward pass of the whole image through the base model.
        errors: relative L2 error to the true Shapley values, of each image; None where it is not finite.
        error: their mean, with its 95 % bootstrap interval.
    """

    method: str
    budget: int
    passes: float
    errors: tuple[float | None, ...]
    error: Interval

    @property
    def label(self) -> str:
        """The method in words."""
        return _LABELS.get(self.method, self.method)


Way = tuple[str, int]
"""Method and budget."""


def ways(budgets: Sequence[int], players: int) -> list[Way]:
    """What is compared: permutation sampling only with the budgets that pay for an order of all players and its reverse."""
    found = [(name, 0) for name in _SINGLE] + [(name, budget) for name in _BUDGETED for budget in budgets]
    return [
        (name, budget)
        for name, budget in found
        if name != "permutation" or budget >= 2 * (players - 1) or pays_for_all(budget, players)
    ]


def errors_of(
    model: nn.Module, plan: Plan, batch: Predicted, indices: Sequence[int], truth: Tensor
) -> list[dict[str, float | None]]:
    """The relative L2 error of what no other part of a record measures, to the truth (B, N), by the name of its row.

    Of a plan without a cost curve that of the untrained gradient alone; of one that is not thorough nothing.
    """
    every = ways(plan.budgets, batch.tiling.count) if plan.cost_curve else [(UNTRAINED, 0)] if plan.thorough else []
    compared = [(method, budget) for method, budget in every if method not in (ONE_PASS, "kernel_shap")]
    return [
        _errors(model, plan, batch, place, indices[place], truth[place], compared) for place in range(len(indices))
    ]


def _errors(
    model: nn.Module, plan: Plan, batch: Predicted, place: int, index: int, truth: Tensor, compared: Sequence[Way]
) -> dict[str, float | None]:
    """Of one image, alone: no image depends on the others."""
    found: dict[str, float | None] = {}
    inputs, target = image_of(batch.inputs, place), int(batch.classes[place, 0])
    for method, budget in compared:
        try:
            explanation = _explained(
                model, plan, inputs, method, budget, seed_of(plan.seed, index, "method"), [target]
            )
        except UnsupportedModelError:  # a model without a gradient by presence
            continue
        found[_row(method, budget)] = float(relative_l2(explanation.for_label(target).flatten().double(), truth))
    return found


def _row(method: str, budget: int) -> str:
    return f"{method} {budget}"


def _explained(
    model: nn.Module,
    plan: Plan,
    inputs: Mapping[str, Tensor],
    method: str,
    budget: int,
    seed: int,
    targets: list[int] | None,
) -> Any:
    """An explanation by a method with a budget; of the class that each image is predicted to be where no target is given."""
    wanted: dict[str, Any] = {"top_k": 1} if targets is None else {"targets": targets}
    wanted |= {"evaluations": budget} if budget else {}
    return attribute(model, inputs, method=method, seed=seed, batch_size=plan.batch_size, **wanted, **plan.options)


def smoothness(records: Sequence[Record], means: Means) -> Interval | None:
    """The mean error of the untrained gradient, None where the model has none."""
    errors = [[record.get("cost_curve", {}).get(_row(UNTRAINED, 0))] for record in records]
    (found,) = means.of_columns(errors)
    return found if found.count else None


# -- time ------------------------------------------------------------------------------------------------------------


def cost_points(
    model: nn.Module, plan: Plan, batch: Predicted, records: Sequence[Record], means: Means
) -> tuple[CostPoint, ...]:
    """A point for each way that was measured on the images of the records; its time is taken on the images of `batch`."""
    every = ways(plan.budgets, batch.tiling.count)
    found = [{way: _error(record, way, plan.budgets) for way in every} for record in records]
    known = [way for way in every if any(errors[way] is not None for errors in found)]
    columns = [[errors[way] for way in known] for errors in found]
    intervals, times = means.of_columns(columns), passes_of(model, plan, batch, known)
    return tuple(
        CostPoint(*way, times[way], tuple(row[place] for row in columns), intervals[place])
        for place, way in enumerate(known)
    )


def _error(record: Record, way: Way, budgets: Sequence[int]) -> float | None:
    """The error of one way in a record; what other tables show, too, is one number."""
    method, budget = way
    if method == ONE_PASS:
        return record["methods"][ONE_PASS].get("error")
    if method == "kernel_shap":
        return record["kernel_shap"][list(budgets).index(budget)]
    return record["cost_curve"].get(_row(*way))


def passes_of(model: nn.Module, plan: Plan, batch: Predicted, compared: Sequence[Way]) -> dict[Way, float]:
    """How long each way takes for an image, over a forward pass of the image through the base model: medians, in turns.

    With LoRA merged, as one would deploy it, and both in batches, as one would explain many images: what a call costs beside
    its arithmetic counts little.
    """
    together = min(plan.batch_size, _TOGETHER if device_of(model).type == "cpu" else _TOGETHER_ON_DEVICE)
    plain, merged, whole = base_alone(model), with_merged_lora(model), _several(batch, together)
    passing = {name: value for name, value in batch.inputs.items() if name not in whole}
    found: dict[Way, float] = {}
    for (earlier, _), (method, budget) in pairwise([("", 0), *compared]):
        count = min(together, max(2, _EVALUATIONS_TIMED // max(budget, 1)))
        some = _several(batch, count)

        def once() -> None:
            plain(**whole, **passing)

        def explain(some: Any = some, method: str = method, budget: int = budget) -> None:
            _explained(merged, plan, some, method, budget, plan.seed, None)

        if method != earlier:
            explain()  # the first call of a method is slower
        repeats = 3 * _REPEATS if not budget else _REPEATS if 2 * budget < _EVALUATIONS_TIMED else 1
        times = [(_work_of(model, once) / together, _work_of(model, explain) / count) for _ in range(repeats)]
        found[method, budget] = median(ours for _, ours in times) / median(one for one, _ in times)
    return found


def _several(batch: Predicted, count: int) -> dict[str, Tensor]:
    """So many images of a batch, in turns."""
    images = images_of(batch.inputs)
    rows = torch.arange(count, device="cpu") % len(batch.classes)
    return {name: value[rows.to(value.device)] for name, value in images.items()}


def _work_of(model: nn.Module, run: Callable[[], Any]) -> float:
    """Seconds that a call takes: on a CPU those of this process alone, whatever else the machine does."""
    if device_of(model).type != "cpu":
        return seconds_of(run)
    start = time.process_time()
    run()
    return time.process_time() - start
