"""An explanation as a matplotlib figure: the picture first, then one map per class, in rows of images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shapadapter.explanation import Explanation
from shapadapter.visual.maps import Bytes, overlay, signed_colors, symmetric_limit
from shapadapter.visual.wording import Column, columns, number, one_line, unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Lengths in inches, text sizes in points.
PANEL, GAP, MARGIN = 2.3, 0.25, 0.2
TITLE, CHECK_LINE, BAR = 0.42, 0.12, 0.62
BAR_WIDTH, BAR_HEIGHT = 1.3, 0.1
LARGE, SMALL = 9.0, 7.5
POINT = 1 / 72


def draw_explanation(
    explanation: Explanation,
    index: int = 0,
    *,
    labels: Sequence[str | int] | None = None,
    smooth: bool = False,
    max_classes: int = 3,
) -> "Figure":
    """Draw one image and its maps.

    The maps share one colour scale, symmetric about zero, with its limits printed. Under each map stands the sum of
    null value and attributions beside the logit it must give, unless the attributions do not sum to the logits, and the
    relative error if it is known.

    Args:
        explanation: Any explanation.
        index: Which image.
        labels: Class names or indices to show; None takes the shown classes with the largest logits.
        smooth: Interpolate the maps, which the figure then says; otherwise every patch has one colour.
        max_classes: How many classes if `labels` is None.

    Returns:
        A figure that belongs to no window; `savefig` writes it.

    Raises:
        ImportError: If matplotlib is missing.
        ClassNotFoundError: If the model has no such class.
        ValueError: If a class was not computed for this image, or a number is not finite.
        IndexError: If there is no such image.
    """
    shown = columns(explanation, index, labels=labels, max_classes=max_classes)
    return _draw([_row(explanation, index, shown, smooth)])


def gallery(
    explanation: Explanation,
    indices: Sequence[int] | None = None,
    *,
    max_classes: int = 2,
    smooth: bool = False,
) -> "Figure":
    """Draw several images as rows of one figure, each with a colour scale of its own.

    Args:
        explanation: Any explanation.
        indices: Which images, in order; None takes all.
        max_classes: How many classes per image, those with the largest logits.
        smooth: As in `draw_explanation`.

    Returns:
        A figure that belongs to no window.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is no image to draw, or a number is not finite.
        IndexError: If there is no such image.
    """
    chosen = range(len(explanation)) if indices is None else indices
    if not chosen:
        raise ValueError("There is no image to draw.")
    return _draw([_row(explanation, i, columns(explanation, i, max_classes=max_classes), smooth) for i in chosen])


def draw_comparison(
    explanations: Sequence[Explanation], index: int = 0, *, label: str | int | None = None, smooth: bool = False
) -> "Figure":
    """Draw one image and the maps of several methods for one class side by side.

    Each map has a colour scale of its own, symmetric about zero, for methods differ in unit. Where a map sums to the
    logit, its sum stands above it and the limits of its scale below.

    Args:
        explanations: Of the same images by the same model, one for each method; `method` is the title.
        index: Which image.
        label: A class name or index; None takes the class with the largest logit that the first explanation shows.
        smooth: Interpolate the maps, which the figure then says.

    Returns:
        A figure that belongs to no window.

    Raises:
        ImportError: If matplotlib is missing.
        ClassNotFoundError: If the model has no such class.
        ValueError: If there is no explanation, they are of different images, the class was not computed by each, or a
            number is not finite.
        IndexError: If there is no such image.
    """
    if not explanations:
        raise ValueError("There is no explanation to draw.")
    first = explanations[0]
    if not all(np.array_equal(first[index].images, one[index].images) for one in explanations):
        raise ValueError(f"Expected explanations of the same images, but image {index} differs.")
    (best,) = columns(first, index, labels=None if label is None else [label], max_classes=1)
    rows = [_row(one, index, columns(one, index, labels=[best.index], max_classes=1), smooth) for one in explanations]
    canvas, panel = _canvas(rows[0].picture, len(rows), 2 * MARGIN + TITLE + BAR)
    top = canvas.down - MARGIN - TITLE
    title = f"{_fit(best.label, '  ' + best.probability)}\n{_fit('predicted ' + rows[0].predicted)}"
    _draw_panel(canvas, MARGIN, top, panel, rows[0].picture, title)
    for place, (one, row) in enumerate(zip(explanations, rows, strict=True)):
        left, sums = MARGIN + (place + 1) * (PANEL + GAP), one.sums_to_logits
        title = f"{_fit(one_line(one.method))}\n{row.shown[0].sum if sums else ''}"
        _draw_panel(canvas, left, top, panel, row.maps[0], title)
        if sums:
            _draw_bar(canvas, left + PANEL / 2, top - panel, row)
        else:
            canvas.text(left + PANEL / 2, top - panel - 0.06, row.unit, SMALL, va="top")
    return canvas.figure


@dataclass(frozen=True)
class _Row:
    """One image: what it shows and, under each map, says."""

    picture: Bytes  # (H, W, 3)
    maps: list[Bytes]  # each (H, W, 3)
    shown: list[Column]
    limit: float
    predicted: str
    unit: str

    @property
    def check(self) -> float:
        """How high the lines under the maps are."""
        return CHECK_LINE * (1 + max(len(column.check.splitlines()) for column in self.shown))


def _row(explanation: Explanation, index: int, shown: list[Column], smooth: bool) -> _Row:
    one = explanation[index]
    picture = one.images[0].numpy()  # (1, H, W, 3) -> (H, W, 3)
    limit = symmetric_limit(np.stack([column.values.numpy() for column in shown]))  # (k, rows, cols) -> one number
    return _Row(
        picture=picture,
        maps=[overlay(picture, one.heatmap(column.index, smooth=smooth), limit) for column in shown],
        shown=shown,
        limit=limit,
        predicted=one_line(one.top(1)[0][0].label),
        unit=unit(explanation) + (", smoothed" if smooth else ""),
    )


@dataclass(frozen=True)
class _Canvas:
    """A figure that is drawn on in inches from its lower left corner."""

    figure: "Figure"
    across: float
    down: float

    def axes(self, left: float, bottom: float, width: float, height: float) -> "Axes":
        box = (left / self.across, bottom / self.down, width / self.across, height / self.down)
        return self.figure.add_axes(box, xticks=[], yticks=[])

    def text(self, x: float, y: float, text: str, size: float, **style: Any) -> None:
        # Class names are not mathematics, whatever dollar signs they hold.
        style = {"ha": "center", "va": "center", "color": "black", "parse_math": False, **style}
        self.figure.text(x / self.across, y / self.down, text, size=size, **style)


def _draw(rows: list[_Row]) -> "Figure":
    """Place the rows below each other."""
    most = max(len(row.maps) for row in rows)
    lines = max(row.check for row in rows)
    canvas, panel = _canvas(rows[0].picture, most, 2 * MARGIN + len(rows) * (TITLE + lines + BAR), len(rows))
    for place, row in enumerate(rows):
        _draw_row(canvas, canvas.down - MARGIN - TITLE - place * (TITLE + panel + lines + BAR), panel, row)
    return canvas.figure


def _canvas(picture: Bytes, maps: int, rest: float, rows: int = 1) -> tuple[_Canvas, float]:
    """A canvas for rows of a picture and maps, `rest` inches higher than their panels, and how high a panel is.

    Every length is fixed, so that nothing overlaps at any image size.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib: pip install "shapadapter[plot]"') from error
    height, width = picture.shape[:2]
    panel = PANEL * height / width
    across, down = 2 * MARGIN + PANEL + maps * (GAP + PANEL), rest + rows * panel
    return _Canvas(Figure(figsize=(across, down), dpi=150, facecolor="white"), across, down), panel


def _draw_row(canvas: _Canvas, top: float, panel: float, row: _Row) -> None:
    """Draw one image whose panels, `panel` high, begin at `top`."""
    _draw_panel(canvas, MARGIN, top, panel, row.picture, f"predicted\n{_fit(row.predicted)}")
    first = MARGIN + PANEL + GAP
    for place, (pixels, column) in enumerate(zip(row.maps, row.shown, strict=True)):
        left = first + place * (PANEL + GAP)
        title = f"{_fit(column.label, '  ' + column.probability)}\n{_fit(column.total)}"
        _draw_panel(canvas, left, top, panel, pixels, title)
        canvas.text(left + PANEL / 2, top - panel - 0.06, column.check, SMALL, va="top")
    _draw_bar(canvas, (first + left + PANEL) / 2, top - panel - row.check, row)


def _draw_panel(canvas: _Canvas, left: float, top: float, height: float, pixels: Bytes, title: str) -> None:
    """Draw pixels (H, W, 3) in a box with the given upper left corner, and two lines above."""
    axes = canvas.axes(left, top - height, PANEL, height)
    axes.imshow(pixels, aspect="auto", interpolation="nearest")
    axes.spines[:].set(color="0.7", linewidth=0.5)
    canvas.text(left + PANEL / 2, top + 0.06, title, LARGE, va="bottom")


def _draw_bar(canvas: _Canvas, middle: float, top: float, row: _Row) -> None:
    """Draw the colour scale of one row, centred on `middle`."""
    left, bottom = middle - BAR_WIDTH / 2, top - BAR_HEIGHT - 0.08
    axes = canvas.axes(left, bottom, BAR_WIDTH, BAR_HEIGHT)
    ramp = np.linspace(-1, 1, 255)[None]  # (1, 255)
    axes.imshow(signed_colors(ramp, 1.0), aspect="auto")
    axes.spines[:].set(color="0.7", linewidth=0.5)
    for share, limit in ((0.0, -row.limit), (0.5, 0.0), (1.0, row.limit)):
        text = number(limit, sign=True) if limit else "0"
        canvas.text(left + share * BAR_WIDTH, bottom - 0.04, text, SMALL, va="top")
    canvas.text(left - 0.08, bottom + BAR_HEIGHT / 2, "against", SMALL, ha="right")
    canvas.text(left + BAR_WIDTH + 0.08, bottom + BAR_HEIGHT / 2, "for", SMALL, ha="left")
    canvas.text(middle, bottom - 0.19, row.unit, SMALL, va="top")


def _fit(name: str, rest: str = "") -> str:
    """Shorten a name until it and the rest of its line are no wider than a panel."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    measure, font = TextToPath(), FontProperties(size=LARGE)
    kept = name[:200]
    while kept and measure.get_text_width_height_descent(_line(name, kept, rest), font, False)[0] > PANEL / POINT:
        kept = kept[:-1]
    return _line(name, kept, rest)


def _line(name: str, kept: str, rest: str) -> str:
    return (kept if kept == name else kept.rstrip() + "…") + rest
