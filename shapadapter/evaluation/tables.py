"""An evaluation as tables: which number stands in which block, row and column, and how to read it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from shapadapter.core.statistics import Interval

if TYPE_CHECKING:
    from shapadapter.evaluation.records import Equivalent
    from shapadapter.evaluation.result import Evaluation

WIDTH = 120
_NAME = 16
_FEW_IMAGES = 8
"""Fewer say little."""

_TASK = {
    "accuracy": "accuracy",
    "cross_entropy": "cross-entropy",
    "absolute_error": "absolute error",
    "squared_error": "squared error",
    "efficiency_gap": "efficiency gap, mean",
    "largest_efficiency_gap": "largest",
}
_MEASURES = {
    "Error to the true Shapley values": {
        "error": "relative L2 ↓",
        "pearson": "Pearson ↑",
        "spearman": "Spearman ↑",
        "top_k_overlap": "top-k ↑",
    },
    "Curves": {
        "insertion": "insertion ↑",
        "deletion": "deletion ↓",
        "aopc_morf": "AOPC MoRF ↑",
        "aopc_lerf": "AOPC LeRF ↓",
        "aopc_gap": "AOPC gap ↑",
    },
    "Random removal and imputation": {
        "sensitivity_n": "sensitivity-n ↑",
        "faithfulness_correlation": "faithfulness ↑",
        "infidelity": "infidelity ↓",
        "road_morf": "ROAD MoRF ↓",
        "road_lerf": "ROAD LeRF ↑",
        "road_gap": "ROAD gap ↑",
    },
    "Localisation": {
        "energy_inside": "energy inside ↑",
        "pointing_game": "pointing ↑",
        "segmentation_accuracy": "accuracy ↑",
        "segmentation_iou": "IoU ↑",
        "segmentation_ap": "AP ↑",
        "grid_pointing": "grid pointing ↑",
    },
    "Sanity": {
        "randomised": "after randomisation → 0",
        "noise_change": "change under noise ↓",
        "noise_ratio": "over change of logits ↓",
    },
    "Cost": {"evaluations": "evaluations", "time": "time / plain", "memory": "memory / plain"},
}
"""The measures of methods by block, with the heads of their columns."""


_EQUAL_COST = "Error at equal cost"


@dataclass(frozen=True)
class Block:
    """One table.

    Attributes:
        title: what it is about.
        columns: heads of the columns after the first.
        rows: a name and a cell for each column; an empty cell says that there is nothing to say.
        note: how to read it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    note: str = ""


# -- numbers ---------------------------------------------------------------------------------------------------------


def blocks(evaluation: Evaluation) -> list[Block]:
    """Every block that has something to say."""
    notes = _notes(evaluation)
    heads = {measure: head for measure, head in _TASK.items() if measure in evaluation.task}
    cells = tuple(column([evaluation.task[measure]])[0] for measure in heads)
    found = [
        Block("Task", tuple(heads.values()), ((f"all {evaluation.about['data']} images", cells),) if cells else ())
    ]
    for title, heads in _MEASURES.items():
        shown = {measure: head for measure, head in heads.items() if _has(evaluation, measure)}
        having = {name: values for name, values in evaluation.methods.items() if shown.keys() & values.keys()}
        columns = [column([values.get(measure) for values in having.values()]) for measure in shown]
        rows = tuple(zip(having, zip(*columns, strict=True), strict=True))
        block = Block(title, tuple(shown.values()), rows, notes[title])
        found.append(_with_baseline(evaluation, block) if "error" in shown else block)
    found.append(_against_cost(evaluation, notes[_EQUAL_COST]))
    return [block for block in found if block.rows]


def _has(evaluation: Evaluation, measure: str) -> bool:
    return any(measure in values for values in evaluation.methods.values())


def _with_baseline(evaluation: Evaluation, block: Block) -> Block:
    """The errors with the budgets of KernelSHAP: its errors stand in the column of the methods' own."""
    own = [evaluation.methods[name].get("error") for name, _ in block.rows]
    errors = column([*own, *evaluation.kernel_shap.values()])
    rows = [
        (name, (error, *cells[1:], _equivalent(evaluation.equivalents.get(name))))
        for (name, cells), error in zip(block.rows, errors, strict=False)
    ]
    pairs = 2 * math.prod(evaluation.about["players"])
    peaks = [budget for budget in evaluation.kernel_shap if abs(budget - pairs) <= 0.1 * pairs]
    blank = ("",) * (len(block.columns) - 1)
    rows += [
        (f"baseline KernelSHAP {budget}{'*' if budget in peaks else ''}", (error, *blank, str(budget)))
        for budget, error in zip(evaluation.kernel_shap, errors[len(block.rows) :], strict=True)
    ]
    peak = (
        " * About as many pairs of coalitions as players: there the fit of KernelSHAP is at its most unstable, and its "
        "error above that of smaller and larger budgets."
    )
    note = block.note + (peak if peaks else "")
    return replace(block, columns=(*block.columns, "= KernelSHAP with"), rows=tuple(rows), note=note)


def _against_cost(evaluation: Evaluation, note: str) -> Block:
    """A row for each point of the cost curve."""
    points = evaluation.cost_curve
    errors = column([point.error for point in points])
    rows = tuple(
        (
            f"{point.label} {point.budget or ''}".rstrip(),
            (f"{point.passes:.3g}" if point.passes < 100 else f"{point.passes:,.0f}", error),
        )
        for point, error in zip(points, errors, strict=True)
    )
    return Block(_EQUAL_COST, ("forward passes ↓", "relative L2 ↓"), rows, note)


def _equivalent(found: Equivalent | None) -> str:
    if found is None:
        return ""
    interval = "" if math.isnan(found.low) or found.bound != "=" else f" ({round(found.low)} to {round(found.high)})"
    return f"{found}{interval}"


def column(intervals: Sequence[Interval | None]) -> list[str]:
    """Means with half the width of their intervals, all to the same digit; of what is known once the mean alone."""
    known = [one for one in intervals if one is not None and math.isfinite(one.mean)]
    largest = max((abs(one.mean) for one in known), default=0)
    whole = all(one.mean.is_integer() and not one.high > one.low for one in known)
    digits = next(digits for end, digits in ((0.05, 4), (10, 3), (100, 2), (math.inf, 1)) if largest < end)
    style = ".0f" if whole else f".{digits}f" if largest >= 1e-3 else ".1e"
    cells = []
    for one in intervals:
        spread = 0 if one is None else one.high - one.low
        half = f" ± {spread / 2:,{style}}" if one and math.isfinite(spread) and spread > 1e-9 * abs(one.mean) else ""
        cells.append(f"{one.mean:,{style}}{half}" if one is not None and math.isfinite(one.mean) else "")
    return cells


# -- words -----------------------------------------------------------------------------------------------------------


def summary(about: Mapping[str, Any]) -> str:
    """What was measured, in a few sentences."""
    rows, cols = about["players"]
    over = "images" if about["groups"] is None else f"{about['groups']} groups of images"
    where = f"{about['checkpoint']} on {about['folder']}: " if "checkpoint" in about else ""
    methods = f" Compared: {', '.join(about['methods'])}." if "methods" in about else ""
    few = about["images"] < _FEW_IMAGES
    doubt = f" Only {about['images']} image{'s' * (about['images'] > 1)}: the numbers say little." if few else ""
    return (
        f"{where}{about['model']}, {rows} x {cols} players, removal by {about['removal']}, prediction by "
        f"{about['prediction']}. {about['images']} of {about['data']} images explained, seed {about['seed']}; explained is "
        f"{about['explained']}, and the game's value is its {about['value']}. Mean ± half the width of the 95 % bootstrap "
        f"interval over {over}.{methods}{doubt}"
    )


def _notes(evaluation: Evaluation) -> dict[str, str]:
    """How to read each block."""
    about = evaluation.about
    count = f"{about['truth_evaluations']:,}"
    truth = f"The truth is exact: all {count} coalitions."
    if about["truth"] != "exact":
        truth = f"The truth is KernelSHAP with {count} evaluations, its own error {about['truth_error']:.2g}."
    object_ = f"The object covers {about['area'] or 0:.3g} of the image: the energy that chance gets inside."
    pointing = "Grid pointing on 2 x 2 montages: chance 0.25." if _has(evaluation, "grid_pointing") else ""
    return {
        "Error to the true Shapley values": (
            f"{truth} Top-k: k = {about['top_k']}. Methods without a unit have no L2 error.{_smoothness(evaluation)}"
        ),
        _EQUAL_COST: (
            "The number in a name is the evaluations that the method was given. Forward passes: measured time for an image "
            "over that of a plain forward pass of the base model, in batches and with LoRA merged, on the machine at hand "
            f"({about.get('device', 'cpu')}). Errors below twice the truth's own, {2 * (about['truth_error'] or 0):.2g}, are "
            "for the most part the truth's."
        ),
        "Curves": (
            f"Read as the explained class's {about['curves_read']}, by this model, with the removal of its game. MoRF: "
            "most relevant first, LeRF: least relevant first."
        ),
        "Random removal and imputation": (
            f"n = {', '.join(map(str, about['removed_counts']))} of {math.prod(about['players'])} players removed, "
            f"{about['removal_draws']} coalitions each, values in logits; faithfulness correlation with the second n. "
            "Infidelity of the map scaled to fit best: equal shares get 1. ROAD: share of images still predicted alike, "
            "mean over 10 % to 90 % of the players imputed."
        ),
        "Localisation": " ".join(part for part in ("" if about["area"] is None else object_, pointing) if part),
        "Sanity": (
            "Spearman correlation with the maps of a model with random parameters; relative change of the map under pixel "
            "noise of 5 % of the image's deviation, and that over the relative change of the logits."
        ),
        "Cost": (
            "Evaluations beyond the forward pass, a gradient counts as one. Time and peak memory of activations over those "
            "of the base model's plain forward pass, measured side by side; of the one pass with LoRA merged."
        ),
    }


def _smoothness(evaluation: Evaluation) -> str:
    """A property of the model, to be read beside the errors of its explanations."""
    if evaluation.smoothness is None:
        return ""
    return (
        f" Error of the untrained gradient: {evaluation.smoothness.mean:.2f} (0 is a perfectly smooth game, where it is "
        "exact)."
    )


def as_text(blocks: Sequence[Block], summary: Sequence[str], notes: Sequence[str]) -> str:
    """All blocks below each other, at most 120 columns wide where the names are not too long."""
    parts = ["\n".join(_wrapped(line) for line in summary if line)]
    for block in blocks:
        cells = [block.columns, *(cells for _, cells in block.rows)]
        widths = [max(map(len, places)) for places in zip(*cells, strict=True)]
        first = max([_NAME, *(len(name) for name, _ in block.rows)])
        lines = [block.title]
        for name, values in (("", block.columns), *block.rows):
            right = "  ".join(f"{value:>{width}}" for value, width in zip(values, widths, strict=True))
            lines.append(f"  {name:<{first}}  {right}".rstrip())
        parts.append("\n".join([*lines, *([_wrapped(block.note, "  ")] if block.note else [])]))
    if notes:
        parts.append("\n".join(["Notes", *(_wrapped(note, "  ") for note in notes)]))
    return "\n\n".join(parts)


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def as_markdown(blocks: Sequence[Block], summary: Sequence[str], notes: Sequence[str]) -> str:
    """All blocks as Markdown."""
    parts = [line for line in summary if line]
    for block in blocks:
        rule = "|" + " --- |" * (len(block.columns) + 1)
        lines = [f"### {block.title}", "", _cells(["", *block.columns]), rule]
        lines += [_cells([name, *cells]) for name, cells in block.rows]
        parts.append("\n".join([*lines, *([f"\n{block.note}"] if block.note else [])]))
    if notes:
        parts.append("\n".join(["### Notes", "", *(f"- {note}" for note in notes)]))
    return "\n\n".join(parts) + "\n"


def _cells(values: Sequence[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"
