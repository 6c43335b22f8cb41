"""An evaluation as tables: which number stands in which block, row and column, and how to read it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shapadapter.core.statistics import Interval

if TYPE_CHECKING:
    from shapadapter.evaluation.result import Equivalent, Evaluation


WIDTH = 120
_NAME = 16


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


def as_text(blocks: Sequence[Block], summary: Sequence[str], notes: Sequence[str]) -> str:
    """All blocks below each other, at most 120 columns wide where the names are not too long."""
    parts = ["\n".join(_wrapped(line) for line in summary if line)]
    for block in blocks:
        widths = [
            max(len(head), *(len(cells[place]) for _, cells in block.rows)) for place, head in enumerate(block.columns)
        ]
        name = max([_NAME, *(len(row) for row, _ in block.rows)])
        lines = [block.title, _line("", block.columns, name, widths)]
        lines += [_line(row, cells, name, widths) for row, cells in block.rows]
        parts.append("\n".join([*lines, *([_wrapped(block.note, "  ")] if block.note else [])]))
    if notes:
        parts.append("\n".join(["Notes", *(_wrapped(note, "  ") for note in notes)]))
    return "\n\n".join(parts)


def as_markdown(blocks: Sequence[Block], summary: Sequence[str], notes: Sequence[str]) -> str:
    """All blocks as Markdown."""
    parts = [line for line in summary if line]
    for block in blocks:
        lines = [f"### {block.title}", "", _cells(["", *block.columns]), "|" + " --- |" * (len(block.columns) + 1)]
        lines += [_cells([row, *cells]) for row, cells in block.rows]
        parts.append("\n".join([*lines, *([f"\n{block.note}"] if block.note else [])]))
    if notes:
        parts.append("\n".join(["### Notes", "", *(f"- {note}" for note in notes)]))
    return "\n\n".join(parts) + "\n"


def _line(name: str, cells: Sequence[str], first: int, widths: Sequence[int]) -> str:
    right = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return f"  {name:<{first}}  {right}".rstrip()


def _cells(values: Sequence[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


About = Mapping[str, Any]

SANITY = (
    "Spearman correlation with the maps of a model with random parameters; relative change of the map under pixel noise "
    "of 5 % of the image's deviation, and that over the relative change of the logits."
)
COST = (
    "Evaluations beyond the forward pass, a gradient counts as one. Time and peak memory of activations over those of the "
    "base model's plain forward pass, measured side by side; of the one pass with LoRA merged."
)


FEW_IMAGES = 8
"""Fewer say little."""


def summary(about: About) -> str:
    """What was measured, in a few sentences."""
    rows, cols = about["players"]
    over = "images" if about["groups"] is None else f"{about['groups']} groups of images"
    where = f"{about['checkpoint']} on {about['folder']}: " if "checkpoint" in about else ""
    methods = f" Compared: {', '.join(about['methods'])}." if "methods" in about else ""
    few = about["images"] < FEW_IMAGES
    doubt = f" Only {about['images']} image{'s' * (about['images'] > 1)}: the numbers say little." if few else ""
    return (
        f"{where}{about['model']}, {rows} x {cols} players, removal by {about['removal']}, prediction by {about['prediction']}. "
        f"{about['images']} of {about['data']} images explained, seed {about['seed']}; explained is {about['explained']}, "
        f"and the game's value is its {about['value']}. Mean ± half the width of the 95 % bootstrap interval over {over}."
        f"{methods}{doubt}"
    )


PEAK = (
    "* About as many pairs of coalitions as players: there the fit of KernelSHAP is at its most unstable, and its error "
    "above that of smaller and larger budgets."
)


def peaks(about: About, budgets: Iterable[int]) -> list[int]:
    """The budgets, in evaluations, within a tenth of two for each player."""
    pairs = 2 * math.prod(about["players"])
    return [budget for budget in budgets if abs(budget - pairs) <= 0.1 * pairs]


def truth(about: About) -> str:
    """Of the error to the truth."""
    count = f"{about['truth_evaluations']:,}"
    if about["truth"] == "exact":
        words = f"The truth is exact: all {count} coalitions."
    else:
        words = f"The truth is KernelSHAP with {count} evaluations, its own error {about['truth_error']:.2g}."
    return f"{words} Top-k: k = {about['top_k']}. Methods without a unit have no L2 error."


def curves(about: About) -> str:
    """Of insertion, deletion and AOPC."""
    return (
        f"Read as the explained class's {about['curves_read']}, by this model, with the removal of its game. MoRF: most "
        "relevant first, LeRF: least relevant first."
    )


def removal(about: About) -> str:
    """Of sensitivity-n, faithfulness correlation, infidelity and ROAD."""
    counts = ", ".join(map(str, about["removed_counts"]))
    return (
        f"n = {counts} of {math.prod(about['players'])} players removed, {about['removal_draws']} coalitions each, values "
        "in logits; faithfulness correlation with the second n. Infidelity of the map scaled to fit best: equal shares get "
        "1. ROAD: share of images still predicted alike, mean over 10 % to 90 % of the players imputed."
    )


def places(about: About, pointing: bool) -> str:
    """Of localisation."""
    area = about["area"]
    words = [] if area is None else [f"The object covers {area:.3g} of the image: the energy that chance gets inside."]
    return " ".join([*words, *(["Grid pointing on 2 x 2 montages: chance 0.25."] if pointing else [])])


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
        _block(evaluation, "Curves", _CURVES, curves(about)),
        _block(evaluation, "Random removal and imputation", {**_RANDOM_REMOVAL, **_ROAD}, removal(about)),
        _block(evaluation, "Localisation", _PLACES, places(about, _has(evaluation, "grid_pointing"))),
        _block(evaluation, "Sanity", _SANITY, SANITY),
        _block(evaluation, "Cost", _COST, COST),
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
    plain = _block(evaluation, "Error to the true Shapley values", _ERRORS, truth(evaluation.about))
    if not _has(evaluation, "error"):
        return plain
    # The ladder's errors stand in the column of the methods' own.
    own = [evaluation.methods[name].get("error") for name, _ in plain.rows]
    errors = column([*own, *evaluation.kernel_shap.values()])
    rows = [
        (name, (error, *cells[1:], _equivalent(evaluation.equivalents.get(name))))
        for (name, cells), error in zip(plain.rows, errors, strict=False)
    ]
    found = peaks(evaluation.about, evaluation.kernel_shap)
    blank = ("",) * (len(plain.columns) - 1)
    rows += [
        (f"baseline KernelSHAP {budget}{'*' if budget in found else ''}", (error, *blank, str(budget)))
        for budget, error in zip(evaluation.kernel_shap, errors[len(plain.rows) :], strict=True)
    ]
    note = plain.note + (f" {PEAK}" if found else "")
    return Block(plain.title, (*plain.columns, "= KernelSHAP with"), tuple(rows), note)


def _equivalent(found: Equivalent | None) -> str:
    if found is None:
        return ""
    interval = "" if math.isnan(found.low) or found.bound != "=" else f" ({round(found.low)} to {round(found.high)})"
    return f"{found}{interval}"
