"""The words and numbers under a map, and for those who do not see it; the same in figures and pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from shapadapter.core.phrases import one_line

if TYPE_CHECKING:
    from shapadapter.explanation.explanation import Explanation

MINUS = "\N{MINUS SIGN}"
UNIT = "contribution to the logit"
NO_UNIT = "relevance, does not sum to the logit"

_LEVELS = {"shapadapter": "one forward pass", "gradient": "forward and backward pass", "refined": "refined"}
_METHODS = {**_LEVELS, "presence_gradient": "presence gradient"}


@dataclass(frozen=True)
class Column:
    """One class of one image, ready to be drawn."""

    index: int  # of the class
    label: str  # its name on one line
    probability: str  # such as `p=0.83`; of a quantity its value
    total: str  # the method, if it is none of our levels, and the sum, such as `Σφ=+4.10`
    sum: str  # of the attributions alone, such as `+4.10`
    # Lines: null value plus attributions, then the logit and the distance between them; neither where the attributions do
    # not sum to the logits; then the level, of our own maps; then the expected error where it is known.
    check: str
    values: Tensor  # (rows, cols) float32, the attributions, in logits if they sum to them
    errors: Tensor | None = None  # (rows, cols) float32, their standard errors, where all are known and finite


def columns(
    explanation: Explanation, index: int, *, labels: Sequence[str | int] | None = None, max_classes: int
) -> list[Column]:
    """What to show for one image, a column per class; without `labels` the shown classes with the largest logits."""
    one = explanation[index]
    if labels is None:
        shown = one.classes[0]  # (1, C) -> (C,)
        best = one.logits[0, shown].argsort(descending=True, stable=True)[: max(max_classes, 0)]  # (k,)
        labels = shown[best].tolist()
    if not labels:
        raise ValueError("There is no class to draw: pass labels, or max_classes of at least 1.")
    return [_column(one, one.class_index(label), explanation.sums_to_logits) for label in labels]


def _column(one: Explanation, class_id: int, sums: bool) -> Column:
    values = one.for_label(class_id)[0]  # (1, rows, cols) -> (rows, cols)
    if not values.isfinite().all():
        raise ValueError(f"The attributions of class {one.labels[class_id]!r} hold NaN or infinite numbers.")
    written, lines = _sum_check(one, [class_id], [values], sums)
    errors = None if one.standard_errors is None else one.column(one.standard_errors, class_id)[0]  # (rows, cols)
    if errors is not None and not errors.isfinite().all():
        errors = None
    # The level stands below the map: beside the sum above it there is no room for its words.
    method = [] if one.method in _LEVELS else [method_name(one.method)]
    lines += [] if method else [level([one])]
    if errors is not None:
        lines.append(expected_error(one, class_id))
    return Column(
        index=class_id,
        label=one_line(one.labels[class_id]),
        probability=likelihood(float(one.probabilities[0, class_id]), float(one.logits[0, class_id])),
        total=", ".join(method + ([f"Σφ={written}"] if sums else [])),
        sum=written,
        check="\n".join(lines),
        values=values,
        errors=errors,
    )


def difference(explanation: Explanation, index: int, first: Column, second: Column, names: Sequence[str]) -> Column:
    """One class minus another, of one image, as a column of its own with the index of the first and no probability."""
    one, sums = explanation[index], explanation.sums_to_logits
    pair = [one.for_label(column.index)[0] for column in (first, second)]  # (rows, cols) each
    written, lines = _sum_check(one, [first.index, second.index], pair, sums)
    return Column(
        index=first.index,
        label=f"{names[0]} {MINUS} {names[1]}",
        probability="",
        total=f"Σφ={written}" if sums else "",
        sum=written,
        check="\n".join(lines),
        values=first.values - second.values,
    )


# -- levels -----------------------------------------------------------------------------------------------------------


def method_name(method: str) -> str:
    """What a method is called beside its maps, on one line."""
    return _METHODS.get(method) or one_line(method)


def level(explanations: Sequence[Explanation]) -> str:
    """How the maps of some explanations were made: "one forward pass", "refined, 256 evaluations" or another method."""
    names = list(dict.fromkeys(method_name(one.method) for one in explanations))
    spent = [one.evaluations for one in explanations if one.method == "refined" and one.evaluations is not None]
    counts = [int(count) for part in spent for count in part]
    if counts:
        low, high = min(counts), max(counts)
        counted = f"refined, {low if low == high else f'{low} to {high}'} evaluations"
        names = [counted if name == "refined" else name for name in names]
    return " or ".join(names)


def expected_error(one: Explanation, class_id: int) -> str:
    """How far the map of a class is thought to be from the Shapley values, of one image with standard errors."""
    assert one.relative_errors is not None
    error = float(one.relative_errors[0, one.classes[0].tolist().index(class_id)])
    if error == 0:
        return "exact Shapley values"
    if not math.isfinite(error):
        return "expected error not known"
    return f"expected error about {100 * error:.0f} %" if error >= 0.01 else "expected error below 1 %"


def unit(explanation: Explanation) -> str:
    """What the numbers of a map are."""
    return UNIT if explanation.sums_to_logits else NO_UNIT


def _sum_check(one: Explanation, classes: list[int], maps: list[Tensor], sums: bool) -> tuple[str, list[str]]:
    """The sum of a map (rows, cols), or of the first minus the second, and lines that check it where it has a unit."""
    totals = [float(values.double().sum()) for values in maps]
    if not sums:
        return number(totals[0] - sum(totals[1:]), sign=True), []
    nulls, logits = ([float(part[0, index]) for index in classes] for part in (one.null_values, one.logits))
    null, total, end, logit = adding_up(nulls, totals, logits)
    gap = abs(nulls[0] + totals[0] - logits[0] - sum(nulls[1:]) - sum(totals[1:]) + sum(logits[1:]))
    names = ("v(∅)", "logit") if len(classes) == 1 else ("Δv(∅)", "logits differ by")
    shown = f"{gap:.0e}".replace("-", MINUS)
    return total, [f"{names[0]} {null} + Σφ {total} = {end}", f"({names[1]} {logit}, gap {shown})"]


# -- numbers and names ------------------------------------------------------------------------------------------------


def adding_up(
    starts: Sequence[float], totals: Sequence[float], ends: Sequence[float], decimals: int = 2
) -> tuple[str, str, str, str]:
    """Write a start, what is added and the end so that the printed numbers add up, to the digit.

    Start and end are rounded, and what is added is the difference of the printed ones: at most one unit of the last
    decimal from its own value. With second numbers everything is the first minus the second, again as printed. Returns
    the start, what is added with its sign, what comes out, and the end; of `decimals` where these say something, else of
    two digits and an exponent.
    """
    largest = max(map(abs, (*starts, *totals, *ends)))
    power = 0 if largest == 0 or 10**-decimals <= largest < 1e5 else math.floor(math.log10(largest))
    places = 1 if power else decimals
    unit = 10.0 ** (power - places)

    def units(values: Sequence[float]) -> int:
        """The first value, minus the second, in printed units."""
        return round(values[0] / unit) - sum(round(value / unit) for value in values[1:])

    def text(count: int, sign: str = "") -> str:
        short = format(count / 10**places, f"{sign}.{places}f")
        return (short + (f"e{power:+03d}" if power else "")).replace("-", MINUS)

    start, end = units(starts), units(ends)
    gap = max(abs(a + b - c) for a, b, c in zip(starts, totals, ends, strict=True))
    # By rounding alone, what comes out is the end.
    reached = end if gap < unit / 2 else units([a + b for a, b in zip(starts, totals, strict=True)])
    return text(start), text(reached - start, "+"), text(reached), text(end)


def number(value: float, *, sign: bool = False) -> str:
    """A finite number for people: two decimals where they say something, else two digits and an exponent."""
    short = value == 0 or 0.01 <= abs(value) < 1e5
    text = format(value, ("+" if sign else "") + (".2f" if short else ".1e"))
    return text.replace("-", MINUS)


def likelihood(probability: float, score: float) -> str:
    """How a class stands: its probability, or the score itself where that is a quantity."""
    return f"= {number(score)}" if math.isnan(probability) else f"p={probability:.2f}"


# -- for those who do not see the picture -----------------------------------------------------------------------------


def alt_text(
    explanation: Explanation,
    index: int = 0,
    *,
    labels: Sequence[str | int] | None = None,
    max_classes: int = 3,
) -> str:
    """Say in a few sentences what the maps of an image show.

    Args:
        explanation: Any explanation.
        index: Which image.
        labels: Class names or indices; None takes the shown classes with the largest logits.
        max_classes: How many classes if `labels` is None.

    Returns:
        The prediction and the level, then for each class its probability, its sum, and where the patches that speak most for it and most
        against it are. One line.

    Raises:
        ClassNotFoundError: If the model has no such class.
        ValueError: If a class was not computed for this image, or a number is not finite.
        IndexError: If there is no such image.
    """
    one = explanation[index]
    rows, cols = one.attributions.shape[1:3]
    parts = [f"Image predicted as {_predicted(one)}, with maps of {rows} by {cols} patches ({level([one])})."]
    for column in columns(explanation, index, labels=labels, max_classes=max_classes):
        total = f", attributions sum to {column.sum}" if explanation.sums_to_logits else ""
        ends = [
            f"strongest {way} it {_place_in_words(column, at)} ({number(float(column.values.flatten()[at]), sign=True)})"
            for way, at, there in (
                ("for", int(column.values.argmax()), bool((column.values > 0).any())),
                ("against", int(column.values.argmin()), bool((column.values < 0).any())),
            )
            if there
        ]
        parts.append(f"{column.label}, {column.probability}{total}: {', '.join(ends) or 'all patches are zero'}.")
    return " ".join(parts)


def gallery_alt_text(explanation: Explanation, indices: Sequence[int], max_classes: int) -> str:
    """The same of several images, shorter."""
    made = level([explanation[index] for index in indices])
    parts = [f"Attribution maps of {len(indices)} {'image' if len(indices) == 1 else 'images'} ({made})."]
    for place, index in enumerate(indices):
        shown = columns(explanation, index, max_classes=max_classes)
        classes = ", ".join(f"{column.label} {column.probability}" for column in shown)
        parts.append(f"{place + 1}: predicted {_predicted(explanation[index])}; maps of {classes}.")
    return " ".join(parts)


def _predicted(one: Explanation) -> str:
    return one_line(one.top(1)[0][0].label)


def _place_in_words(column: Column, at: int) -> str:
    """Where a patch is, in the words of nine fields and as row and column from 1."""
    rows, cols = column.values.shape
    row, col = divmod(at, cols)
    down, along = ("top", "middle", "bottom")[3 * row // rows], ("left", "center", "right")[3 * col // cols]
    words = "center" if (down, along) == ("middle", "center") else f"{down} {along}"
    return f"at the {words}, row {row + 1}, column {col + 1}"
