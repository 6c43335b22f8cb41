"""Which number of an evaluation stands in which block, row and column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shapadapter.metrics import Interval

from . import notes
from .table import Block

if TYPE_CHECKING:
    from .result import Equivalent, Evaluation

_ERRORS = {
    "error": "relative L2 ↓",
    "pearson": "Pearson ↑",
    "spearman": "Spearman ↑",
    "top_k_overlap": "top-k ↑",
}
_CURVES = {
    "insertion": "insertion ↑",
    "deletion": "deletion ↓",
    "aopc_morf": "AOPC MoRF ↑",
    "aopc_lerf": "AOPC LeRF ↓",
    "aopc_gap": "AOPC gap ↑",
}
_RANDOM_REMOVAL = {
    "sensitivity_n": "sensitivity-n ↑",
    "faithfulness_correlation": "faithfulness ↑",
    "infidelity": "infidelity ↓",
}
_ROAD = {"road_morf": "ROAD MoRF ↓", "road_lerf": "ROAD LeRF ↑", "road_gap": "ROAD gap ↑"}
_PLACES = {
    "energy_inside": "energy inside ↑",
    "pointing_game": "pointing ↑",
    "segmentation_accuracy": "accuracy ↑",
    "segmentation_iou": "IoU ↑",
    "segmentation_ap": "AP ↑",
    "grid_pointing": "grid pointing ↑",
}
_SANITY = {
    "randomised": "after randomisation → 0",
    "noise_change": "change under noise ↓",
    "noise_ratio": "over change of logits ↓",
}
_COST = {"evaluations": "evaluations", "time": "time / plain", "memory": "memory / plain"}
_TASK = {
    "accuracy": "accuracy",
    "cross_entropy": "cross-entropy",
    "absolute_error": "absolute error",
    "squared_error": "squared error",
    "efficiency_gap": "efficiency gap, mean",
    "largest_efficiency_gap": "largest",
}


def blocks(evaluation: Evaluation) -> list[Block]:
    """Every block that has something to say."""
    about = evaluation.about
    found = [
        _task(evaluation),
        _errors(evaluation),
        _block(evaluation, "Curves", _CURVES, notes.curves(about)),
        _block(evaluation, "Random removal and imputation", {**_RANDOM_REMOVAL, **_ROAD}, notes.removal(about)),
        _block(evaluation, "Localisation", _PLACES, notes.places(about, _has(evaluation, "grid_pointing"))),
        _block(evaluation, "Sanity", _SANITY, notes.SANITY),
        _block(evaluation, "Cost", _COST, notes.COST),
    ]
    return [block for block in found if block.rows]


def column(intervals: Sequence[Interval | None]) -> list[str]:
    """Means with half the width of their intervals, all to the same digit; of what is known once the mean alone."""
    shown = [one for one in intervals if one is not None and math.isfinite(one.mean)]
    largest = max((abs(one.mean) for one in shown), default=0)
    whole = all(one.mean.is_integer() and not one.high > one.low for one in shown)
    digits = next(digits for end, digits in ((0.05, 4), (10, 3), (100, 2), (math.inf, 1)) if largest < end)
    style = ".0f" if whole else f".{digits}f" if largest >= 1e-3 else ".1e"
    return [_cell(one, style) for one in intervals]


def _cell(interval: Interval | None, style: str) -> str:
    if interval is None or not math.isfinite(interval.mean):
        return ""
    spread = interval.high - interval.low
    if not math.isfinite(spread) or spread <= 1e-9 * abs(interval.mean):
        return f"{interval.mean:,{style}}"
    return f"{interval.mean:,{style}} ± {spread / 2:,{style}}"


def _block(evaluation: Evaluation, title: str, heads: dict[str, str], note: str = "") -> Block:
    """A row for each method that has one of the measures, a column for each measure that a method has."""
    shown = {measure: head for measure, head in heads.items() if _has(evaluation, measure)}
    having = {
        method: values for method, values in evaluation.methods.items() if any(measure in values for measure in shown)
    }
    columns = [column([values.get(measure) for values in having.values()]) for measure in shown]
    rows = tuple((method, tuple(cells)) for method, cells in zip(having, zip(*columns, strict=True), strict=True))
    return Block(title, tuple(shown.values()), rows, note)


def _has(evaluation: Evaluation, measure: str) -> bool:
    return any(measure in values for values in evaluation.methods.values())


def _task(evaluation: Evaluation) -> Block:
    shown = {measure: head for measure, head in _TASK.items() if measure in evaluation.task}
    cells = tuple(column([evaluation.task[measure]])[0] for measure in shown)
    return Block("Task", tuple(shown.values()), ((f"all {evaluation.about['data']} images", cells),) if cells else ())


def _errors(evaluation: Evaluation) -> Block:
    plain = _block(evaluation, "Error to the true Shapley values", _ERRORS, notes.truth(evaluation.about))
    if not _has(evaluation, "error"):
        return plain
    # The ladder's errors stand in the column of the methods' own.
    own = [evaluation.methods[name].get("error") for name, _ in plain.rows]
    errors = column([*own, *evaluation.kernel_shap.values()])
    rows = [
        (name, (error, *cells[1:], _equivalent(evaluation.equivalents.get(name))))
        for (name, cells), error in zip(plain.rows, errors, strict=False)
    ]
    peaks = notes.peaks(evaluation.about, evaluation.kernel_shap)
    blank = ("",) * (len(plain.columns) - 1)
    rows += [
        (f"baseline KernelSHAP {budget}{'*' if budget in peaks else ''}", (error, *blank, str(budget)))
        for budget, error in zip(evaluation.kernel_shap, errors[len(plain.rows) :], strict=True)
    ]
    note = plain.note + (f" {notes.PEAK}" if peaks else "")
    return Block(plain.title, (*plain.columns, "= KernelSHAP with"), tuple(rows), note)


def _equivalent(found: Equivalent | None) -> str:
    if found is None:
        return ""
    interval = "" if math.isnan(found.low) or found.bound != "=" else f" ({round(found.low)} to {round(found.high)})"
    return f"{found}{interval}"
