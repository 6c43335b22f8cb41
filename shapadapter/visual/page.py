"""An explanation as one HTML file that needs nothing else: no network, no server, no library."""

import base64
import io
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image
from torch import Tensor

from shapadapter.explanation import Explanation
from shapadapter.files import write_together
from shapadapter.visual.maps import BLUE, PICTURE_CONTRAST, RED, symmetric_limit
from shapadapter.visual.wording import columns, likelihood, number, one_line, unit

TEMPLATE = "page.html.j2"


def write_page(
    explanation: Explanation | Sequence[Explanation],
    path: str | Path,
    *,
    title: str = "Explanation",
    table: Sequence[tuple[str, str]] | None = None,
    names: Sequence[str] | None = None,
    max_classes: int = 10,
) -> Path:
    """Write an explanation, or several by one method, as a self-contained HTML page.

    Each image comes with a button per class, the map of the chosen class over the picture, the value of any patch on
    hover, tap or arrow key, with its standard error if it has one, one colour scale per image and the sum check. Class
    names may hold anything.

    Args:
        explanation: Any explanation; several may be of images of different sizes.
        path: The file to write; it is never seen half-written. Its directory must exist.
        title: The heading.
        table: Rows of (name, value) shown above the images.
        names: Of the images, one for each, such as their files'.
        max_classes: How many of the shown classes each image offers, those with the largest logits.

    Returns:
        The path.

    Raises:
        ValueError: If an attribution is not finite, `max_classes` is less than one, or there is no image, or not a name
            for each.
        OSError: If the file cannot be written.
    """
    parts = [explanation] if isinstance(explanation, Explanation) else list(explanation)
    images = [_image(part, index, max_classes) for part in parts for index in range(len(part))]
    if not parts or (names is not None and len(names) != len(images)):
        raise ValueError(f"Expected some images and a name for each, got {len(images)} and {len(names or ())}.")
    # jinja's `tojson` filter escapes <, > and & and leaves nothing but ASCII, so that no name can end the script.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("shapadapter.visual").joinpath(TEMPLATE).read_text("utf-8"))
    page = template.render(
        title=title,
        table=table or (),
        images=images,
        names=[one_line(name) for name in names or ()],
        unit=unit(parts[0]),
        sums=all(part.sums_to_logits for part in parts),
        method=one_line(parts[0].method),
        red=",".join(map(str, RED)),
        blue=",".join(map(str, BLUE)),
        contrast=PICTURE_CONTRAST,
    )
    write_together({Path(path): page.encode()})
    return Path(path)


def _image(explanation: Explanation, index: int, max_classes: int) -> dict[str, Any]:
    """What the template needs for one image; `data` is what the script reads."""
    shown = columns(explanation, index, max_classes=max_classes)
    limit = symmetric_limit(np.stack([column.values.numpy() for column in shown]))  # (k, rows, cols) -> one number
    best = explanation[index].top(1)[0][0]
    pixels = explanation.images[index].numpy()  # (H, W, 3)
    classes = [
        {
            "label": column.label,
            "probability": column.probability,
            "total": column.total,
            "check": column.check,
            "values": _rounded(column.values, 5),
            "errors": None if column.errors is None else _rounded(column.errors, 2),
        }
        for column in shown
    ]
    return {
        "source": _data_uri(pixels),
        "height": pixels.shape[0],
        "width": pixels.shape[1],
        "predicted": f"{one_line(best.label)} ({likelihood(best.probability, best.logit)})",
        "limits": (number(-limit), number(limit, sign=True)) if limit else ("0", "0"),
        "data": {"limit": limit, "classes": classes},
    }


def _rounded(values: Tensor, digits: int) -> list[list[float]]:
    """Values (rows, cols) as json takes them."""
    return [[float(f"{value:.{digits}g}") for value in row] for row in values.tolist()]


def _data_uri(pixels: np.ndarray) -> str:
    """Pixels (H, W, 3) uint8 as a lossless picture inside a link."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
