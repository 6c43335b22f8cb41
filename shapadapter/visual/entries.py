"""What a page says about one image, as the template and the script read it."""

import io
from base64 import b64encode
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from shapadapter.explanation import Explanation, Prediction
from shapadapter.visual.maps import symmetric_limit
from shapadapter.visual.wording import Column, columns, likelihood, one_line

LOSSLESS_BYTES = 20_000
"""A picture whose png is larger is written as jpeg."""

LONGEST_SIDE = 512
"""Of a picture on the page, in pixels; the numbers do not depend on it."""


@dataclass(frozen=True)
class Entry:
    """One image of a page.

    Attributes:
        source: The picture inside a link.
        name: Of the image; empty without.
        predicted: The likeliest class with its probability.
        true: The true class; empty where it is not known.
        data: What the script reads; plain numbers, lists and dicts.
    """

    source: str
    name: str
    predicted: str
    true: str
    data: dict[str, Any]


def entry(explanation: Explanation, index: int, max_classes: int, name: str, true: str | int | None) -> Entry:
    """Collect what is shown of one image.

    Args:
        explanation: Any explanation.
        index: Which image.
        max_classes: How many classes at most, beside the true one.
        name: Of the image; empty without.
        true: The true class, by name or index.

    Returns:
        The entry.

    Raises:
        ClassNotFoundError: If the model has no such class.
        ValueError: If a number is not finite or no class is left.
    """
    right = None if true is None else explanation.class_index(true)
    shown = _columns(explanation, index, max_classes, right)
    best = explanation[index].top(1)[0][0]
    pixels = explanation.images[index].numpy()  # (H, W, 3)
    return Entry(
        source=_data_uri(pixels),
        name=one_line(name),
        predicted=f"{one_line(best.label)} ({likelihood(best.probability, best.logit)})",
        true="" if right is None else one_line(explanation.labels[right]),
        data={
            "name": one_line(name),
            "width": pixels.shape[1],
            "height": pixels.shape[0],
            "limit": symmetric_limit(np.stack([column.values.numpy() for column in shown])),  # (k, rows, cols) -> one
            **_standing(best, right, explanation),
            "gap": float(explanation[index].efficiency_gap[0]),
            "classes": [{**_class(explanation, index, column), "true": column.index == right} for column in shown],
        },
    )


def _columns(explanation: Explanation, index: int, max_classes: int, right: int | None) -> list[Column]:
    """The likeliest classes, and the true one if it was explained."""
    shown = columns(explanation, index, max_classes=max_classes)
    if right is not None and right in explanation.classes[index] and right not in [one.index for one in shown]:
        shown += columns(explanation, index, labels=[right], max_classes=1)
    return shown


def _standing(best: Prediction, right: int | None, explanation: Explanation) -> dict[str, Any]:
    """What a gallery sorts by and searches in; None for what is not known."""
    known = np.isfinite(best.probability)
    return {
        "predicted": one_line(best.label),
        "stands": likelihood(best.probability, best.logit),
        "confidence": float(f"{best.probability:.4g}") if known else None,
        "right": None if right is None else best.index == right,
        "true": None if right is None else one_line(explanation.labels[right]),
    }


def _class(explanation: Explanation, index: int, column: Column) -> dict[str, Any]:
    """One class of one image."""
    return {
        "label": column.label,
        "probability": column.probability,
        "total": column.total,
        "check": column.check,
        "null": _short(float(explanation.null_values[index, column.index]), 7),
        "logit": _short(float(explanation.logits[index, column.index]), 7),
        "values": _rounded(column.values, 5),
        "errors": None if column.errors is None else _rounded(column.errors, 2),
    }


def _rounded(values: Tensor, digits: int) -> list[list[float]]:
    """Values (rows, cols) as json takes them."""
    return [[_short(value, digits) for value in row] for row in values.tolist()]


def _short(value: float, digits: int) -> float:
    """A number that takes few letters."""
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 10**digits else short


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    """Pixels (H, W, 3) as a picture inside a link: lossless if that is small."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    content, kind = _encoded(picture, format="PNG", optimize=True), "png"
    if len(content) > LOSSLESS_BYTES:
        content, kind = _encoded(picture, format="JPEG", quality=85, optimize=True), "jpeg"
    return f"data:image/{kind};base64," + b64encode(content).decode()


def _encoded(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, **options)
    return buffer.getvalue()
