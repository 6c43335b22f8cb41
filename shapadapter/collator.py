"""From rows of a data set to a batch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shapadapter.errors import ImageError, ShapleyError
from shapadapter.images import IMAGE_INPUTS, prepare_images
from shapadapter.labels import LABEL_COLUMNS
from shapadapter.texts import TextRules, prepare_texts

IMAGE_COLUMNS = ("pixel_values", "image", "img")
TEXT_COLUMNS = ("text", "caption")


class ImageCollator:
    """Turn rows with `image` and `label` columns into `pixel_values` (B, C, H, W) and `labels` (B,).

    Images may be PIL images, arrays, or paths; rows that already hold `pixel_values` tensors (a transform made them)
    are stacked. Labels may be missing. For a model that matches images with texts there is a `text` or `caption` column
    instead, one text for each image. Columns it has no use for are named in one warning.

    Args:
        processor: the image processor, with texts the processor of both; needed unless rows hold `pixel_values`.
        texts: what the model asks of texts; None for a model without.
        truncate: whether to cut texts that are too long; else they are refused.
    """

    def __init__(self, processor: Any | None = None, texts: TextRules | None = None, truncate: bool = False) -> None:
        self.processor = processor
        self.texts = texts
        self.truncate = truncate
        self._warned = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate.

        Raises:
            ImageError: no image column, an unreadable image, or no processor to prepare it.
            ShapleyError: a model with texts, but no text column, or a text that is too long.
        """
        image, label = find_column(rows[0], IMAGE_COLUMNS), find_column(rows[0], LABEL_COLUMNS)
        text = find_column(rows[0], TEXT_COLUMNS) if self.texts is not None else None
        self._warn_unused(set(rows[0]) - {image, label if self.texts is None else text, *IMAGE_INPUTS})
        if image is None:
            raise ImageError(f"Expected an image column named one of {IMAGE_COLUMNS}, got columns {sorted(rows[0])}.")
        batch: dict[str, Any] = self._pixels(rows, image)
        if self.texts is not None:
            return {**batch, **self._captions(rows, text, self.texts), "return_loss": True}
        if label is not None:
            batch["labels"] = as_labels([row[label] for row in rows])  # (B,) or (B, K)
        return batch

    def _captions(self, rows: Sequence[dict[str, Any]], column: str | None, rules: TextRules) -> dict[str, Tensor]:
        if column is None:
            raise ShapleyError(
                f"The model matches images with texts: expected a text column named one of {TEXT_COLUMNS}, got columns "
                f"{sorted(rows[0])}."
            )
        return prepare_texts([row[column] for row in rows], self.processor, rules, self.truncate)

    def _pixels(self, rows: Sequence[dict[str, Any]], column: str) -> dict[str, Tensor]:
        images = [row[column] for row in rows]
        if column == "pixel_values":
            own = [name for name in IMAGE_INPUTS if name in rows[0]]
            return {name: _stacked(name, [torch.as_tensor(row[name]) for row in rows]) for name in own}
        if self.processor is None:
            raise ImageError(
                "Images need an image processor: pass processing_class=AutoImageProcessor.from_pretrained(...)."
            )
        return prepare_images(images, self.processor)

    def _warn_unused(self, unused: set[str]) -> None:
        if unused and not self._warned:
            warnings.warn(f"The collator does not use the columns {sorted(unused)}.", stacklevel=3)
            self._warned = True


def _stacked(name: str, values: list[Tensor]) -> Tensor:
    shapes = sorted({tuple(value.shape) for value in values})
    if len(shapes) > 1:
        raise ImageError(f"Expected {name} of one shape in a batch, got {shapes}. Resize the images to one size.")
    return torch.stack(values)  # (B, ...)


def as_labels(values: list[Any]) -> Tensor:
    """Class indices (B,) int64, or regression targets and multi-hot rows in float32.

    Raises:
        ShapleyError: rows of labels differ in length.
    """
    rows = [torch.as_tensor(value) for value in values]
    if len({row.shape for row in rows}) > 1:
        raise ShapleyError(
            f"Labels of one batch must have one shape, got {sorted({tuple(row.shape) for row in rows})}. Several labels of "
            "an image are a row of zeros and ones, one number for each class."
        )
    labels = torch.stack(rows)
    return labels.long() if labels.ndim == 1 and not labels.is_floating_point() else labels.float()


def find_column(row: dict[str, Any], names: Sequence[str]) -> str | None:
    """The first of `names` that `row` has."""
    return next((name for name in names if name in row), None)
