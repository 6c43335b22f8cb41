"""The mean colour of a data set, as its images reach the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shapadapter.augmenting import seeded

from .glance import some_rows
from .reading import readable_rows

# Images that are looked at. The mean of 256 is within a few hundredths of a standard deviation of that of all.
_IMAGES = 256
_BATCH = 32


def mean_color(dataset: Any, collate: Callable[[list[Any]], dict[str, Any]]) -> list[float]:
    """The mean of each channel over up to 256 images, evenly spread over a data set that has a length.

    The same in every process and in every run: no random numbers are drawn that the training would miss.

    Args:
        dataset: the training data.
        collate: makes a batch with `pixel_values` (B, C, H, W) of its rows.

    Returns:
        One number for each channel, as the image processor scales them.
    """
    sums: list[Tensor] = []
    with seeded(0):
        rows = some_rows(dataset, _IMAGES)
        while batch := list(itertools.islice(rows, _BATCH)):
            inputs, read, _ = readable_rows(collate(batch))
            pixels = inputs["pixel_values"][:read].float()  # (R, C, H, W)
            sums.append(pixels.mean(dim=(2, 3)))  # (B, C)
    return [round(mean, 6) for mean in torch.cat(sums).mean(dim=0).tolist()]
