"""Which number of an evaluation stands in which block, row and column."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from shapadapter.metrics import Interval

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
    "segmentation_accuracy": "pixel acc. ↑",
    "segmentation_iou": "IoU ↑",
    "segmentation_ap": "AP ↑",
    "grid_pointing": "grid pointing ↑",
}
_SANITY = {
    "randomised": "after randomisation → 0",
    "noise_change": "change under noise ↓",
    "noise_ratio": "over change of logits ↓",
}
_COST = {"evaluations": "evaluations", "time": "time", "memory": "peak memory"}
_TASK = {
    "accuracy": "accuracy",
    "cross_entropy": "cross-entropy",
    "absolute_error": "absolute error",
    "squared_error": "squared error",
    "efficiency_gap": "efficiency gap, mean",
    "largest_efficiency_gap": "largest",
}


def summary(evaluation: Evaluation) -> str:
    """What was measured, in a few sentences."""
    about = evaluation.about
    rows, cols = about["players"]
    over = "images" if about["groups"] is None else f"{about['groups']} groups of images"
    return (
        f"{about['model']}, {rows} x {cols} players, removal by {about['removal']}, prediction by {about['prediction']}. "
        f"{about['images']} of {about['data']} images explained, seed {about['seed']}; explained is {about['explained']}, "
        f"and the game's value is its {about['value']}. Mean ± half the width of the 95 % bootstrap interval over {over}."
    )


def blocks(evaluation: Evaluation) -> list[Block]:
    """Every block that has something to say."""
    about = evaluation.about
    counts = ", ".join(map(str, about["removed_counts"]))
    curves = (
        f"Curves are read as the explained class's {about['curves_read']}, on the same removal as the attributions."
    )
    removal = f"n = {counts} of {math.prod(about['players'])} players, {about['removal_draws']} coalitions each, values in logits. "
    removal += (
        "Infidelity: of the map scaled to fit best, 1 is no better than the mean drop. ROAD: share of images still "
    )
    removal += "predicted alike, mean over 10 % to 90 % of the players imputed."
    area = about["area"]
    places = (
        "" if area is None else f"The object covers {area:.3g} of the image: what chance gets of energy and pointing. "
    )
    places += "Grid pointing on 2 x 2 montages: chance 0.25." if _has(evaluation, "grid_pointing") else ""
    sanity = (
        "Spearman correlation with the maps of a model with random parameters; relative change of the map under pixel "
    )
    sanity += "noise of 5 % of the image's deviation, and that over the relative change of the logits."
    cost = (
        "Evaluations beyond the forward pass. Time and peak memory of its activations, against the base model's plain "
    )
    cost += "forward pass, side by side; of the one pass with LoRA merged."
    found = [
        _task(evaluation),
        _errors(evaluation),
        _block(evaluation, "Curves", _CURVES, curves),
        _block(evaluation, "Random removal and imputation", {**_RANDOM_REMOVAL, **_ROAD}, removal),
        _block(evaluation, "Localisation", _PLACES, places.strip()),
        _block(evaluation, "Sanity", _SANITY, sanity),
        _block(evaluation, "Cost", _COST, cost),
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
    ladder = [
        (f"KernelSHAP {budget}", (cell(error), *blank[1:], str(budget)))
        for budget, error in evaluation.kernel_shap.items()
    ]
    about = evaluation.about
    note = f"The truth is exact: all {about['truth_evaluations']:,} coalitions."
    if about["truth"] != "exact":
        note = f"The truth is KernelSHAP with {about['truth_evaluations']:,} evaluations, its own error {about['truth_error']:.2g}."
    note += f" Top-k: k = {about['top_k']}. Methods without a unit have no L2 error."
    return Block(plain.title, (*plain.columns, "= KernelSHAP with"), tuple(rows + ladder), note)


def _equivalent(found: Equivalent | None) -> str:
    if found is None:
        return ""
    interval = "" if math.isnan(found.low) or found.bound != "=" else f" ({round(found.low)} to {round(found.high)})"
    return f"{found}{interval}"
