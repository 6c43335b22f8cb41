"""An explanation as one HTML file that needs nothing else: no network, no server, no library."""

import base64
import hashlib
import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from shapadapter.core.files import write_together
from shapadapter.core.statistics import Interval
from shapadapter.explanation.explanation import Explanation, Prediction
from shapadapter.visual.charts import charts
from shapadapter.visual.colors import BLUE, RED, symmetric_limit
from shapadapter.visual.marks import WORTH_A_SIGN
from shapadapter.visual.wording import Column, columns, likelihood, one_line, unit

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


SCRIPTS = ("numbers.js", "map.js", "buildup.js", "inspector.js", "gallery.js", "start.js")
MOST_IMAGES = 500
"""A page with more would be slow to open and to search."""


class Table(Protocol):
    """A table of an evaluation, such as `shapadapter.evaluation.tables.Block`."""

    @property
    def title(self) -> str:
        """What it is about."""

    @property
    def columns(self) -> Sequence[str]:
        """Heads of the columns after the first."""

    @property
    def rows(self) -> Sequence[tuple[str, Sequence[str]]]:
        """A name, and a cell for each column."""

    @property
    def note(self) -> str:
        """How to read it."""


@dataclass(frozen=True)
class Measures:
    """What an evaluation found, to stand above the images.

    Attributes:
        tables: Of its measures, shown on request.
        curves: `Evaluation.curves`, of which insertion and deletion are drawn.
        curves_read: What these curves follow, such as "probability".
        notes: Sentences: what was measured, and what to be careful with.
    """

    tables: Sequence[Table] = ()
    curves: Mapping[str, Mapping[str, Sequence[Interval]]] = field(default_factory=dict)
    curves_read: str = "probability"
    notes: Sequence[str] = ()


def write_page(
    explanation: Explanation | Sequence[Explanation],
    path: str | Path,
    *,
    title: str = "Explanation",
    table: Sequence[tuple[str, str]] | None = None,
    names: Sequence[str] | None = None,
    max_classes: int = 10,
    true_labels: Sequence[str | int | None] | None = None,
    measures: Measures | None = None,
) -> Path:
    """Write an explanation, or several by one method, as a self-contained HTML page.

    One image at a time is shown large: the value of any patch for every class on hover, tap or arrow key, with its
    standard error if it has one; the map of a class or of the difference between two; a threshold; how the attributions
    add up to the logit. The others stand in a gallery that can be sorted, filtered and searched. Names may hold anything.

    Args:
        explanation: Any explanation; several may be of images of different sizes.
        path: The file to write; it is never seen half-written. Its directory must exist.
        title: The heading.
        table: Rows of (name, value) shown above the images.
        names: Of the images, one for each, such as their files'.
        max_classes: How many of the shown classes each image offers, those with the largest logits; the true class comes
            on top, if it was explained.
        true_labels: The class name or index that is right for each image, None where it is not known. The page then
            begins with the wrong predictions.
        measures: What an evaluation found, shown above the images.

    Returns:
        The path.

    Raises:
        ClassNotFoundError: If a true label is no class of the model.
        ValueError: If an attribution is not finite, `max_classes` is less than one, there are more than 500 images or
            none, or not a name or true label for each.
        OSError: If the file cannot be written.
    """
    parts = [explanation] if isinstance(explanation, Explanation) else list(explanation)
    count = sum(map(len, parts))
    _check(count, names, true_labels)
    places = [(part, index) for part in parts for index in range(len(part))]
    given = zip(places, names or [""] * count, true_labels or [None] * count, strict=True)
    images = [entry(part, index, max_classes, name, true) for (part, index), name, true in given]
    page = _render(
        title=title,
        table=table or (),
        measures=measures,
        charts=charts(measures.curves) if measures else (),
        images=images,
        known=any(image.data["right"] is not None for image in images),
        data={
            "images": [image.data for image in images],
            "red": RED,
            "blue": BLUE,
            "worth": WORTH_A_SIGN,
            "sums": bool(parts) and all(part.sums_to_logits for part in parts),
        },
        unit=unit(parts[0]) if parts else "",
        method=one_line(parts[0].method) if parts else "",
    )
    write_together({Path(path): page.encode()})
    return Path(path)


def _check(count: int, names: Sequence[str] | None, true_labels: Sequence[str | int | None] | None) -> None:
    """Refuse what makes no page."""
    for what, given in (("name", names), ("true label", true_labels)):
        if given is not None and len(given) != count:
            raise ValueError(f"Expected some images and a {what} for each, got {count} and {len(given)}.")
    if count == 0:
        raise ValueError("Expected some images, got none.")
    if count > MOST_IMAGES:
        raise ValueError(
            f"A page holds at most {MOST_IMAGES} images, got {count}: write several, such as of explanation[:{MOST_IMAGES}]."
        )


def _render(**values: object) -> str:
    """Fill the template; style and script are let through by their hashes, and nothing else is."""
    style, script = _read("page.css"), "\n".join(map(_read, SCRIPTS))
    # jinja's `tojson` filter escapes <, > and & and leaves nothing but ASCII, so that no name can end the script.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_read("page.html.j2")).render(
        style=Markup(style), script=Markup(script), hashes=(_hash(style), _hash(script)), **values
    )


def _read(name: str) -> str:
    return resources.files("shapadapter.visual").joinpath("web", name).read_text("utf-8")


def _hash(text: str) -> str:
    """As a content security policy names a text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
