"""The words and numbers under a map, the same in figures and pages."""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from shapadapter.explanation import Explanation

MINUS = "\N{MINUS SIGN}"
UNIT = "contribution to the logit"
NO_UNIT = "relevance, does not sum to the logit"

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Left unclosed in a class name they would turn the words and numbers after it.
_TURNS = "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


@dataclass(frozen=True)
class Column:
    """One class of one image, ready to be drawn.

    Attributes:
        index: The class index.
        label: The class name on one line.
        probability: Such as `p=0.83`; of a quantity its value.
        total: The method, if it is another one, and the sum of its attributions, such as `Σφ=+4.10`.
        sum: The sum of its attributions alone.
        check: Lines: the sum of null value and attributions, then the logit and the distance between them; neither where
            the attributions do not sum to the logits; the relative error where it is known.
        values: (rows, cols) float32, the attributions, in logits if they sum to them.
        errors: (rows, cols) float32, their standard errors; None without them, or where not all are finite.
    """

    index: int
    label: str
    probability: str
    total: str
    sum: str
    check: str
    values: Tensor
    errors: Tensor | None = None


def columns(
    explanation: Explanation, index: int, *, labels: Sequence[str | int] | None = None, max_classes: int
) -> list[Column]:
    """What to show for one image.

    Args:
        explanation: Any explanation.
        index: Which image.
        labels: Class names or indices, in the order wanted; None takes the shown classes, largest logit first.
        max_classes: How many at most; ignored if `labels` are given.

    Returns:
        One column per class.

    Raises:
        ClassNotFoundError: If the model has no such class.
        ValueError: If a class was not computed for this image, no class is left, or a number is not finite.
        IndexError: If there is no such image.
    """
    one = explanation[index]
    if labels is None:
        shown = one.classes[0]  # (1, C) -> (C,)
        best = one.logits[0, shown].argsort(descending=True, stable=True)[: max(max_classes, 0)]  # (k,)
        labels = shown[best].tolist()
    if not labels:
        raise ValueError("There is no class to draw: pass labels, or max_classes of at least 1.")
    sums = explanation.sums_to_logits
    return [_column(one, one.class_index(label), sums) for label in labels]


def difference(explanation: Explanation, index: int, first: Column, second: Column, names: Sequence[str]) -> Column:
    """One class minus another, of one image, as a column of its own.

    Args:
        explanation: Any explanation.
        index: Which image.
        first: The class to speak for.
        second: The class to speak against.
        names: What to call the two.

    Returns:
        The column; its probability is empty and its index that of the first class.
    """
    one, values = explanation[index], first.values - second.values  # (rows, cols)
    total = float(values.double().sum())
    sum_check = ""
    if explanation.sums_to_logits:
        null, logit = (
            float(part[0, first.index]) - float(part[0, second.index]) for part in (one.null_values, one.logits)
        )
        sum_check = "\n".join(_check_lines("Δv(∅)", null, total, "logits differ by", logit))
    written = f"Σφ={number(total, sign=True)}"
    return Column(
        index=first.index,
        label=f"{names[0]} {MINUS} {names[1]}",
        probability="",
        total=written if explanation.sums_to_logits else "",
        sum=written,
        check=sum_check,
        values=values,
    )


def unit(explanation: Explanation) -> str:
    """What the numbers of a map are."""
    return UNIT if explanation.sums_to_logits else NO_UNIT


def _column(one: Explanation, class_id: int, sums: bool) -> Column:
    values = one.for_label(class_id)[0]  # (1, rows, cols) -> (rows, cols)
    if not values.isfinite().all():
        raise ValueError(f"The attributions of class {one.labels[class_id]!r} hold NaN or infinite numbers.")
    errors, total = _errors(one, class_id), float(values.double().sum())
    written = f"Σφ={number(total, sign=True)}"
    method = [] if one.method == "shapadapter" else [one_line(one.method)]
    return Column(
        index=class_id,
        label=one_line(one.labels[class_id]),
        probability=likelihood(float(one.probabilities[0, class_id]), float(one.logits[0, class_id])),
        total=", ".join(method + ([written] if sums else [])),
        sum=written,
        check="\n".join(
            (_sum_check(one, class_id, total) if sums else []) + ([] if errors is None else [_accuracy(one, class_id)])
        ),
        values=values,
        errors=errors,
    )


def _sum_check(one: Explanation, class_id: int, total: float) -> list[str]:
    return _check_lines("v(∅)", float(one.null_values[0, class_id]), total, "logit", float(one.logits[0, class_id]))


def _check_lines(start: str, null: float, total: float, end: str, logit: float) -> list[str]:
    gap = f"{abs(null + total - logit):.0e}".replace("-", MINUS)
    return [
        f"{start} {number(null)} + Σφ {number(total, sign=True)} = {number(null + total)}",
        f"({end} {number(logit)}, gap {gap})",
    ]


def _accuracy(one: Explanation, class_id: int) -> str:
    assert one.relative_errors is not None
    error = float(one.relative_errors[0, _place(one, class_id)])
    spent = "" if one.evaluations is None else f" after {int(one.evaluations[0])} evaluations"
    return f"relative error {error:.2g}{spent}"


def _errors(one: Explanation, class_id: int) -> Tensor | None:
    if one.standard_errors is None:
        return None
    errors = one.standard_errors[0, :, :, _place(one, class_id)]  # (1, rows, cols, C) -> (rows, cols)
    return errors if bool(errors.isfinite().all()) else None


def _place(one: Explanation, class_id: int) -> int:
    """In which column a class is."""
    return one.classes[0].tolist().index(class_id)


def likelihood(probability: float, score: float) -> str:
    """How a class stands: its probability, or the score itself where that is a quantity."""
    return f"= {number(score)}" if math.isnan(probability) else f"p={probability:.2f}"


def one_line(label: str) -> str:
    """A class name without line breaks, doubled blanks, control characters and marks that turn the direction of text."""
    plain = "".join(" " if unicodedata.category(sign) == "Cc" else sign for sign in label if sign not in _TURNS)
    return " ".join(plain.split())


def superscript(power: int) -> str:
    """A whole number as an exponent."""
    return str(power).translate(_RAISED)


def number(value: float, *, sign: bool = False) -> str:
    """Write a number for people.

    Args:
        value: Any finite number.
        sign: Write a plus before positive ones.

    Returns:
        Two decimals where they say something, else two digits and an exponent; with a true minus sign.
    """
    short = value == 0 or 0.01 <= abs(value) < 1e5
    text = format(value, ("+" if sign else "") + (".2f" if short else ".1e"))
    return text.replace("-", MINUS)
