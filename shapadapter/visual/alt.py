"""Explanations in words, for those who do not see the picture."""

from __future__ import annotations

from collections.abc import Sequence

from shapadapter.explanation import Explanation

from .wording import Column, columns, number, one_line

_DOWN, _ALONG = ("top", "middle", "bottom"), ("left", "centre", "right")


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
        The prediction, then for each class its probability, its sum, and where the patches that speak most for it and most
        against it are. One line.

    Raises:
        ClassNotFoundError: If the model has no such class.
        ValueError: If a class was not computed for this image, or a number is not finite.
        IndexError: If there is no such image.
    """
    one = explanation[index]
    best = one.top(1)[0][0]
    rows, cols = one.attributions.shape[1:3]
    shown = columns(explanation, index, labels=labels, max_classes=max_classes)
    sums = explanation.sums_to_logits
    method = "" if one.method == "shapadapter" else f" by {one_line(one.method)}"
    start = f"Image predicted as {one_line(best.label)}, with maps{method} of {rows} by {cols} patches."
    return " ".join([start, *(_of_class(column, sums) for column in shown)])


def alt_text_of_gallery(explanation: Explanation, indices: Sequence[int], max_classes: int) -> str:
    """The same of several images, shorter."""
    parts = []
    for place, index in enumerate(indices):
        shown = columns(explanation, index, max_classes=max_classes)
        classes = ", ".join(f"{column.label} {column.probability}" for column in shown)
        parts.append(f"{place + 1}: predicted {one_line(explanation[index].top(1)[0][0].label)}; maps of {classes}.")
    return " ".join([f"Attribution maps of {len(parts)} {'image' if len(parts) == 1 else 'images'}.", *parts])


def _of_class(column: Column, sums: bool) -> str:
    total = f", attributions sum to {column.sum}" if sums else ""
    ends = [
        f"strongest {way} it {_place(column, at)} ({number(float(column.values.flatten()[at]), sign=True)})"
        for way, at, there in (
            ("for", int(column.values.argmax()), bool((column.values > 0).any())),
            ("against", int(column.values.argmin()), bool((column.values < 0).any())),
        )
        if there
    ]
    return f"{column.label}, {column.probability}{total}: {', '.join(ends) if ends else 'all patches are zero'}."


def _place(column: Column, at: int) -> str:
    """Where a patch is, in the words of nine fields and as row and column from 1."""
    rows, cols = column.values.shape
    row, col = divmod(at, cols)
    words = f"{_DOWN[3 * row // rows]} {_ALONG[3 * col // cols]}"
    return f"at the {'centre' if words == 'middle centre' else words}, row {row + 1}, column {col + 1}"
