"""An explanation as one HTML file that needs nothing else: no network, no server, no library."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Protocol

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from shapadapter.atomic import write_together
from shapadapter.explanation import Explanation
from shapadapter.metrics import Interval
from shapadapter.visual.charts import charts
from shapadapter.visual.entries import entry
from shapadapter.visual.maps import BLUE, RED
from shapadapter.visual.marks import WORTH_A_SIGN
from shapadapter.visual.wording import one_line, unit

SCRIPTS = ("numbers.js", "map.js", "buildup.js", "inspector.js", "gallery.js", "start.js")
MOST_IMAGES = 500
"""A page with more would be slow to open and to search."""


class Table(Protocol):
    """A table of an evaluation, such as `shapadapter.evaluation.table.Block`."""

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
