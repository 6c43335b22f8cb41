"""An explanation as one HTML file that needs nothing else: no network, no server, no library."""

from __future__ import annotations

import hashlib
import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from shapadapter.core.files import write_together
from shapadapter.core.phrases import one_line
from shapadapter.core.statistics import Interval
from shapadapter.visual.charts import page_charts
from shapadapter.visual.maps import BLUE, RED, WORTH_A_SIGN, symmetric_limit
from shapadapter.visual.wording import Column, columns, level, likelihood, unit

if TYPE_CHECKING:
    from shapadapter.explanation.explanation import Explanation

_LOSSLESS_BYTES = 20_000  # a picture whose PNG is larger is written as JPEG
_LONGEST_SIDE = 512  # of a picture on the page, in pixels; the numbers do not depend on it
_MOST_IMAGES = 500  # a page with more would be slow to open and to search
_SCRIPTS = ("numbers.js", "map.js", "buildup.js", "inspector.js", "gallery.js", "start.js")


@dataclass(frozen=True)
class Measures:
    """What an evaluation found, to stand above the images.

    Attributes:
        tables: Of its measures, shown on request, each with a `title`, heads of its `columns`, `rows` of a name and cells,
            and a `note` on how to read it, such as `shapadapter.evaluation.tables.Block`.
        curves: `Evaluation.curves`, of which insertion and deletion are drawn.
        curves_read: What these curves follow, such as "probability".
        notes: Sentences: what was measured, and what to be careful with.
    """

    tables: Sequence[Any] = ()
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
    """Write an explanation, or several by one method, as a self-contained HTML page, and return its path.

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

    Raises:
        ClassNotFoundError: If a true label is no class of the model.
        ValueError: If an attribution is not finite, `max_classes` is less than one, there are more than 500 images or
            none, or not a name or true label for each.
        OSError: If the file cannot be written.
    """
    parts = list(explanation) if isinstance(explanation, Sequence) else [explanation]
    places = [(part, index) for part in parts for index in range(len(part))]
    _check(len(places), names, true_labels)
    given = zip(places, names or [""] * len(places), true_labels or [None] * len(places), strict=True)
    images = [_entry(part, index, max_classes, name, true) for (part, index), name, true in given]
    page = _render(
        title=title,
        table=table or (),
        measures=measures,
        charts=page_charts(measures.curves) if measures else (),
        images=images,
        known=any(image["data"]["right"] is not None for image in images),
        data={
            "images": [image["data"] for image in images],
            "red": RED,
            "blue": BLUE,
            "worth": WORTH_A_SIGN,
            "sums": all(part.sums_to_logits for part in parts),
        },
        unit=unit(parts[0]),
        level=level(parts),
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
    if count > _MOST_IMAGES:
        raise ValueError(
            f"A page holds at most {_MOST_IMAGES} images, got {count}: write several, such as of explanation[:{_MOST_IMAGES}]."
        )


def _entry(
    explanation: Explanation, index: int, max_classes: int, name: str, true: str | int | None
) -> dict[str, Any]:
    """One image of a page: its picture inside a link, words for the gallery, and `data` for the script."""
    one = explanation[index]
    right = None if true is None else explanation.class_index(true)
    shown = columns(explanation, index, max_classes=max_classes)
    if right is not None and right in one.classes[0] and right not in [column.index for column in shown]:
        shown += columns(explanation, index, labels=[right], max_classes=1)
    best, label = one.top(1)[0][0], None if right is None else one_line(explanation.labels[right])
    stands = likelihood(best.probability, best.logit)
    pixels = explanation.images[index].numpy()  # (H, W, 3)
    data = {
        "name": one_line(name),
        "width": pixels.shape[1],
        "height": pixels.shape[0],
        "limit": symmetric_limit(np.stack([column.values.numpy() for column in shown])),  # (k, rows, cols) -> one
        # What a gallery sorts by and searches in; None for what is not known.
        "predicted": one_line(best.label),
        "stands": stands,
        "confidence": float(f"{best.probability:.4g}") if np.isfinite(best.probability) else None,
        "right": None if right is None else best.index == right,
        "true": label,
        "gap": float(one.efficiency_gap[0]),
        "classes": [{**_class(one, column), "true": column.index == right} for column in shown],
    }
    predicted = f"{data['predicted']} ({stands})"
    return {
        "source": _data_uri(pixels),
        "name": data["name"],
        "predicted": predicted,
        "true": label or "",
        "data": data,
    }


def _class(one: Explanation, column: Column) -> dict[str, Any]:
    """One class of one image."""
    return {
        "label": column.label,
        "probability": column.probability,
        "total": column.total,
        "check": column.check,
        "null": _short(float(one.null_values[0, column.index]), 7),
        "logit": _short(float(one.logits[0, column.index]), 7),
        "values": _rounded(column.values, 5),
        "errors": None if column.errors is None else _rounded(column.errors, 2),
    }


def _rounded(values: Tensor, digits: int) -> list[list[float]]:
    """Values (rows, cols) as JSON takes them."""
    return [[_short(value, digits) for value in row] for row in values.tolist()]


def _short(value: float, digits: int) -> float:
    """A number that takes few letters."""
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 10**digits else short


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    """Pixels (H, W, 3) as a picture inside a link: lossless if that is small."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    file, kind = io.BytesIO(), "png"
    picture.save(file, kind)
    if len(file.getvalue()) > _LOSSLESS_BYTES:
        file, kind = io.BytesIO(), "jpeg"
        picture.save(file, kind, quality=85, optimize=True)
    return f"data:image/{kind};base64,{b64encode(file.getvalue()).decode()}"


def _render(**values: object) -> str:
    """Fill the template; style and script are let through by their hashes, and nothing else is."""
    style, script = _read("page.css"), "\n".join(map(_read, _SCRIPTS))
    # jinja's `tojson` filter escapes <, > and & and leaves nothing but ASCII, so that no name can end the script.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_read("page.html.j2")).render(
        style=Markup(style), script=Markup(script), hashes=(_hash(style), _hash(script)), **values
    )


def _read(name: str) -> str:
    return resources.files("shapadapter.visual").joinpath("web", name).read_text("utf-8")


def _hash(text: str) -> str:
    """As a content security policy names a text."""
    return "sha256-" + b64encode(hashlib.sha256(text.encode()).digest()).decode()
