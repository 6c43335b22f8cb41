"""The mean map of each class over a data set: what a model looks for, beyond one image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from shapadapter.classes import find_class
from shapadapter.explanation import Explanation

_SIDE = 128
"""Of a mean picture, in pixels at most, or one per player: a thousand classes have to fit in memory."""


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
    given = [explanations] if isinstance(explanations, Explanation) else explanations
    names = None if labels is None else iter(labels)
    running: dict[int, _Running] = {}
    first, count, sums = None, 0, True
    for explanation in given:
        first = first or explanation
        _check_alike(first, explanation)
        sums &= explanation.sums_to_logits
        for index in range(len(explanation)):
            one = explanation[index]
            chosen = int(one.logits[0].argmax()) if names is None else one.class_index(_next(names, count))
            values = one.for_label(chosen)[0].double()  # (1, rows, cols) -> (rows, cols)
            if not values.isfinite().all():
                raise ValueError(f"The attributions of image {count} hold NaN or infinite numbers.")
            running.setdefault(chosen, _Running()).add(values, _small(one.images, values.shape))
            count += 1
    if first is None or not running:
        raise ValueError("There is no image to average over.")
    if names is not None and next(names, None) is not None:
        raise ValueError(f"Expected a label for each of the {count} images, but got more.")
    classes = sorted(running)
    found = [running[index] for index in classes]
    return MeanMaps(
        labels=first.labels,
        classes=torch.tensor(classes, device="cpu"),
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
        """Count one more map (rows, cols) and its picture (H, W, 3); Welford's running mean and squared distances."""
        self.count += 1
        step = values - self.mean  # (rows, cols)
        self.mean = self.mean + step / self.count
        self.squares = self.squares + step * (values - self.mean)
        self.picture = self.picture + (picture - self.picture) / self.count  # (h, w, 3)

    @property
    def deviation(self) -> Tensor:
        """Per player, (rows, cols)."""
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


def _next(names: Iterator[str | int], count: int) -> str | int:
    for name in names:
        return name
    raise ValueError(f"Expected a label for each image, but there are only {count}.")


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
