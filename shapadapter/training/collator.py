"""From rows of a data set to a batch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shapadapter.errors import ImageError
from shapadapter.images import prepare_images

IMAGE_COLUMNS = ("pixel_values", "image", "img")
LABEL_COLUMNS = ("labels", "label")


class ImageCollator:
    """Turn rows with `image` and `label` columns into `pixel_values` (B, C, H, W) and `labels` (B,).

    Images may be PIL images, arrays, or paths; rows that already hold `pixel_values` tensors (a transform made them)
    are stacked. Labels may be missing. Columns it has no use for are named in one warning.

    Args:
        processor: the image processor; needed unless rows hold `pixel_values`.
    """

    def __init__(self, processor: Any | None = None) -> None:
        self.processor = processor
        self._warned = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate.

        Raises:
            ImageError: no image column, an unreadable image, or no processor to prepare it.
        """
        image, label = find_column(rows[0], IMAGE_COLUMNS), find_column(rows[0], LABEL_COLUMNS)
        self._warn_unused(set(rows[0]) - {image, label})
        if image is None:
            raise ImageError(f"Expected an image column named one of {IMAGE_COLUMNS}, got columns {sorted(rows[0])}.")
        batch = {"pixel_values": self._pixels([row[image] for row in rows], prepared=image == "pixel_values")}
        if label is not None:
            batch["labels"] = as_labels([row[label] for row in rows])  # (B,) or (B, K)
        return batch

    def _pixels(self, images: list[Any], prepared: bool) -> Tensor:
        if prepared:
            return torch.stack([torch.as_tensor(image) for image in images])  # (B, C, H, W)
        if self.processor is None:
            raise ImageError(
                "Images need an image processor: pass processing_class=AutoImageProcessor.from_pretrained(...)."
            )
        return prepare_images(images, self.processor)

    def _warn_unused(self, unused: set[str]) -> None:
        if unused and not self._warned:
            warnings.warn(f"The collator does not use the columns {sorted(unused)}.", stacklevel=3)
            self._warned = True


def as_labels(values: list[Any]) -> Tensor:
    """Class indices (B,) int64, or regression targets and multi-hot rows in float32."""
    labels = torch.stack([torch.as_tensor(value) for value in values])
    return labels if labels.ndim == 1 and not labels.is_floating_point() else labels.float()


def find_column(row: dict[str, Any], names: Sequence[str]) -> str | None:
    """The first of `names` that `row` has."""
    return next((name for name in names if name in row), None)
