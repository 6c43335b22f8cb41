"""The mean map of each class over a data set, and its figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from shapadapter.core.phrases import one_line
from shapadapter.data.classes import find_class
from shapadapter.visual.canvas import (
    BAR,
    GAP,
    MARGIN,
    SMALL,
    Canvas,
    draw_bar,
    draw_panel,
    draw_scale,
    fit,
    new_canvas,
)
from shapadapter.visual.maps import Bytes, Floats, hatch, mark_signs, overlay, symmetric_limit
from shapadapter.visual.wording import NO_UNIT, UNIT, number

if TYPE_CHECKING:
    from shapadapter.explanation.explanation import Explanation

_SIDE = 128  # of a mean picture, in pixels, or one per player: those of a thousand classes have to fit in memory


@dataclass(frozen=True)
class MeanMaps:
    """Mean attribution maps, C of K classes: those with at least one image, by class index.

    A class's map is the mean, over the images that belong to the class, of their maps of that class. Signs are kept.

    Attributes:
        labels: The K class names.
        classes: (C,) int64, the class index of each map.
        counts: (C,) int64, how many images each is the mean of.
        means: (C, rows, cols) float64, in logits if `sums_to_logits`.
        deviations: (C, rows, cols) float64, the standard deviation over the images (divided by n - 1); NaN of one image.
        pictures: (C, h, w, 3) uint8, the mean pictures, 128 pixels high and wide at most (more if there are more players).
        by: "predicted" or "labelled": what makes an image belong to a class.
        sums_to_logits: Whether null value + attributions = logit, for all images.
    """

    labels: tuple[str, ...]
    classes: Tensor
    counts: Tensor
    means: Tensor
    deviations: Tensor
    pictures: Tensor
    by: str
    sums_to_logits: bool

    def for_label(self, name_or_id: str | int) -> Tensor:
        """The mean map of one class, (rows, cols) float64.

        Raises:
            ClassNotFoundError: If the model has no such class.
            ValueError: If no image belongs to the class.
        """
        return self.means[self.place(name_or_id)]

    def place(self, name_or_id: str | int) -> int:
        """Where a class stands among the C; raises as `for_label` does."""
        index = find_class(self.labels, name_or_id)
        found = (self.classes == index).nonzero().flatten().tolist()
        if not found:
            raise ValueError(f"No image is {self.by} as class {self.labels[index]!r}, so it has no mean map.")
        return int(found[0])


def mean_maps(
    explanations: Explanation | Iterable[Explanation], labels: Iterable[str | int] | None = None
) -> MeanMaps:
    """Average the maps of each class over many images.

    Explanations are taken one by one and forgotten, so that a data set of any size fits:
    `mean_maps(explain(model, batch, processor, top_k=1) for batch in batches)`.

    Args:
        explanations: One, or any number of them, of images of one size by one model and method.
        labels: For each image the class it belongs to, a name or an index; None takes the class the model predicts.

    Returns:
        The mean, the standard deviation and the number of images of each class.

    Raises:
        ClassNotFoundError: If a label is no class of the model.
        ValueError: If there is no image, the explanations do not fit each other, there is not a label for each image, an
            image's class was not computed for it, or a number is not finite.
    """
    given = explanations if isinstance(explanations, Iterable) else [explanations]
    names = None if labels is None else iter(labels)
    running: dict[int, _Running] = {}
    first, count, sums = None, 0, True
    for explanation in given:
        first = first or explanation
        _check_alike(first, explanation)
        sums &= explanation.sums_to_logits
        for index in range(len(explanation)):
            one = explanation[index]
            chosen = int(one.logits[0].argmax())
            if names is not None:
                name = next(names, None)
                if name is None:
                    raise ValueError(f"Expected a label for each image, but there are only {count}.")
                chosen = one.class_index(name)
            values = one.for_label(chosen)[0].double()  # (1, rows, cols) -> (rows, cols)
            if not values.isfinite().all():
                raise ValueError(f"The attributions of image {count} hold NaN or infinite numbers.")
            running.setdefault(chosen, _Running()).add(values, _small(one.images, values.shape))
            count += 1
    if first is None or not running:
        raise ValueError("There is no image to average over.")
    if names is not None and next(names, None) is not None:
        raise ValueError(f"Expected a label for each of the {count} images, but got more.")
    found = [running[index] for index in sorted(running)]
    return MeanMaps(
        labels=first.labels,
        classes=torch.tensor(sorted(running), device="cpu"),
        counts=torch.tensor([one.count for one in found], device="cpu"),
        means=torch.stack([one.mean for one in found]),
        deviations=torch.stack([one.deviation for one in found]),
        pictures=torch.stack([one.picture.round().clamp(0, 255).byte() for one in found]),
        by="predicted" if labels is None else "labelled",
        sums_to_logits=sums,
    )


class _Running:
    """Mean and spread of maps that come one after the other (Welford 1962), and the mean of their pictures."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = self.picture = torch.zeros((), device="cpu")

    def add(self, values: Tensor, picture: Tensor) -> None:
        """Count one more map (rows, cols) and its picture (h, w, 3)."""
        self.count += 1
        step = values - self.mean  # (rows, cols)
        self.mean = self.mean + step / self.count
        self.squares = self.squares + step * (values - self.mean)
        self.picture = self.picture + (picture - self.picture) / self.count  # (h, w, 3)

    @property
    def deviation(self) -> Tensor:
        """Per player, (rows, cols); NaN of one map."""
        nothing = torch.full_like(self.squares, torch.nan)
        return (self.squares / (self.count - 1)).sqrt() if self.count > 1 else nothing


def _small(images: Tensor, players: torch.Size) -> Tensor:
    """The picture of one image with a whole number of pixels for each player: (1, H, W, 3) -> (h, w, 3) float32."""
    height, width = images.shape[1:3]
    shrink = max(1.0, max(height, width) / _SIDE)
    rows, cols = (
        count * max(1, int(side / shrink / count)) for side, count in zip((height, width), players, strict=True)
    )
    planes = images.float().permute(0, 3, 1, 2)  # (1, H, W, 3) -> (1, 3, H, W)
    return adaptive_avg_pool2d(planes, (rows, cols))[0].permute(1, 2, 0)  # (1, 3, h, w) -> (h, w, 3)


def _check_alike(first: Explanation, other: Explanation) -> None:
    for what, one, two in (
        ("classes", first.labels, other.labels),
        ("players", tuple(first.attributions.shape[1:3]), tuple(other.attributions.shape[1:3])),
        ("image sizes", tuple(first.images.shape[1:3]), tuple(other.images.shape[1:3])),
        ("methods", first.method, other.method),
    ):
        if one != two:
            raise ValueError(
                f"Expected explanations by one model and method, but their {what} differ: {one} and {two}."
            )


_PANEL, _BETWEEN, _TITLE = 1.45, 0.08, 0.56
_SURE = 2.0  # standard errors from zero


def draw_class_means(means: MeanMaps, *, labels: Sequence[str | int] | None = None, max_classes: int = 10) -> Figure:
    """Draw the mean map of each class beside the mean picture and the spread over the images.

    All maps share one color scale, all spreads another. A patch whose mean is less than two standard errors from zero
    is hatched: more images may turn its sign. One map is never the whole truth, so each names its number of images.

    Args:
        means: What `mean_maps` found.
        labels: Class names or indices, in the order wanted; None takes those with the most images.
        max_classes: How many if `labels` is None.

    Returns:
        A figure that belongs to no window.

    Raises:
        ClassNotFoundError: If the model has no such class.
        ValueError: If a class has no image, or there is no class to draw.
    """
    if labels is None:
        places = sorted(means.counts.argsort(descending=True, stable=True).tolist()[: max(max_classes, 0)])
    else:
        places = [means.place(label) for label in labels]
    if not places:
        raise ValueError("There is no class to draw: pass labels, or max_classes of at least 1.")
    limit = symmetric_limit(means.means[places].numpy())
    spread = float(means.deviations[places].nan_to_num(nan=0.0).max())  # NaN of one image, which has no spread
    across = 1 if len(places) <= 3 else 2
    height, width = means.pictures.shape[1:3]
    panel = (_PANEL, _PANEL * height / width)
    block, step, bars = 3 * _PANEL + 2 * _BETWEEN, _TITLE + panel[1] + 0.1, BAR + 0.14
    lines = -(-len(places) // across)
    canvas = new_canvas(2 * MARGIN + across * (block + GAP) - GAP, 2 * MARGIN + lines * step + bars)
    said = []
    for index, place in enumerate(places):
        row, col = divmod(index, across)
        corner = (MARGIN + col * (block + GAP), canvas.down - MARGIN - _TITLE - row * step)
        _draw_class(canvas, means, place, corner, panel, (limit, spread))
        values = means.means[place]
        row, col = divmod(int(values.argmax()), values.shape[1])
        said.append(
            f"{_name(means, place)}, {_images(means, place)}: most in favor is the patch in row {row + 1}, column {col + 1}, "
            f"{number(float(values.max()), sign=True)}"
        )
    notes = [UNIT if means.sums_to_logits else NO_UNIT, "hatched: less than 2 standard errors from 0"]
    draw_bar(canvas, canvas.across / 2 - 1.05, MARGIN + bars, limit, notes)
    grays, ticks = _grays(np.linspace(0, 1, 255)[None], 1.0), {0.0: "0", 1.0: number(spread)}
    draw_scale(canvas, canvas.across / 2 + 1.4, MARGIN + bars, grays, ticks, ["standard deviation over images"])
    canvas.figure.alt_text = f"Mean attribution maps of images {means.by} as a class. {'; '.join(said)}."
    return canvas.figure


def _draw_class(
    canvas: Canvas,
    means: MeanMaps,
    place: int,
    corner: tuple[float, float],
    panel: tuple[float, float],
    limits: tuple[float, float],
) -> None:
    """Draw one class below its upper left corner; the limits are those of the means and of the deviations."""
    (left, top), (limit, spread) = corner, limits
    picture = means.pictures[place].numpy()
    values, deviations = means.means[place].numpy(), means.deviations[place].nan_to_num(nan=0.0).numpy()
    count, step = int(means.counts[place]), _PANEL + _BETWEEN
    title = fit(_name(means, place), f"  ({_images(means, place)} {means.by})", width=3 * _PANEL)
    canvas.text(left, top + 0.27, title, 9.0, ha="left", va="bottom")
    draw_panel(canvas, left, top, panel, picture, "mean picture", SMALL)
    drawn = overlay(picture, _enlarge(values, picture), limit)
    total = f"mean, Σφ={number(float(values.sum()), sign=True)}" if means.sums_to_logits else "mean"
    axes = draw_panel(canvas, left + step, top, panel, drawn, total, SMALL)
    if count > 1:
        hatch(axes, np.abs(values) < _SURE * deviations / np.sqrt(count))
    mark_signs(axes, values, limit)
    words = "standard deviation" if count > 1 else "spread unknown"
    draw_panel(canvas, left + 2 * step, top, panel, _grays(_enlarge(deviations, picture), spread), words, SMALL)


def _grays(values: Floats, limit: float) -> Bytes:
    """White for nothing, near black for the limit: (...) -> (..., 3)."""
    share = values / limit if limit > 0 else np.zeros_like(values)
    return np.repeat(np.rint(255 - 215 * share).astype(np.uint8)[..., None], 3, axis=-1)


def _enlarge(values: Floats, picture: Bytes) -> Floats:
    """(rows, cols) -> (h, w), whole multiples of them."""
    height, width = (side // count for side, count in zip(picture.shape[:2], values.shape, strict=True))
    return values.repeat(height, axis=0).repeat(width, axis=1)


def _name(means: MeanMaps, place: int) -> str:
    return one_line(means.labels[int(means.classes[place])])


def _images(means: MeanMaps, place: int) -> str:
    count = int(means.counts[place])
    return "1 image" if count == 1 else f"{count} images"
