"""Which number of an evaluation stands in which block, row and column."""

from __future__ import annotations

import math
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


def cell(interval: Interval | None) -> str:
    """A mean with half the width of its interval; of what does not vary, or is known once, the mean alone."""
    if interval is None or not math.isfinite(interval.mean):
        return ""
    spread = interval.high - interval.low
    if not math.isfinite(spread) or spread <= 1e-9 * abs(interval.mean):
        return f"{interval.mean:.3g}" if abs(interval.mean) < 1000 else f"{interval.mean:,.0f}"
    return str(interval)


def _block(evaluation: Evaluation, title: str, heads: dict[str, str], note: str = "") -> Block:
    """A row for each method that has one of the measures, a column for each measure that a method has."""
    shown = {measure: head for measure, head in heads.items() if _has(evaluation, measure)}
    rows = tuple(
        (method, tuple(cell(values.get(measure)) for measure in shown))
        for method, values in evaluation.methods.items()
        if any(measure in values for measure in shown)
    )
    return Block(title, tuple(shown.values()), rows, note)


def _has(evaluation: Evaluation, measure: str) -> bool:
    return any(measure in values for values in evaluation.methods.values())


def _task(evaluation: Evaluation) -> Block:
    shown = {measure: head for measure, head in _TASK.items() if measure in evaluation.task}
    cells = tuple(cell(evaluation.task[measure]) for measure in shown)
    return Block("Task", tuple(shown.values()), ((f"all {evaluation.about['data']} images", cells),) if cells else ())


def _errors(evaluation: Evaluation) -> Block:
    plain = _block(evaluation, "Error to the true Shapley values", _ERRORS)
    rows = [(name, (*cells, _equivalent(evaluation.equivalents.get(name)))) for name, cells in plain.rows]
    blank = ("",) * len(plain.columns)
    peaks = notes.peaks(evaluation.about, evaluation.kernel_shap)
    ladder = [
        (f"baseline KernelSHAP {budget}{'*' if budget in peaks else ''}", (cell(error), *blank[1:], str(budget)))
        for budget, error in evaluation.kernel_shap.items()
    ]
    note = notes.truth(evaluation.about) + (f" {notes.PEAK}" if peaks else "")
    return Block(plain.title, (*plain.columns, "= KernelSHAP with"), tuple(rows + ladder), note)


def _equivalent(found: Equivalent | None) -> str:
    if found is None:
        return ""
    interval = "" if math.isnan(found.low) or found.bound != "=" else f" ({round(found.low)} to {round(found.high)})"
    return f"{found}{interval}"
