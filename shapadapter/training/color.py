"""The mean colour of a data set, as its images reach the model."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

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
    with _undisturbed():
        rows = _rows(dataset)
        while batch := list(itertools.islice(rows, _BATCH)):
            pixels = collate(batch)["pixel_values"].float()  # (B, C, H, W)
            sums.append(pixels.mean(dim=(2, 3)))  # (B, C)
    return [round(mean, 6) for mean in torch.cat(sums).mean(dim=0).tolist()]


def _rows(dataset: Any) -> Iterator[Any]:
    streamed = isinstance(dataset, IterableDataset)  # which has the method of data sets by index, but it only raises
    if not streamed and isinstance(dataset, Sized) and hasattr(dataset, "__getitem__"):
        count = min(len(dataset), _IMAGES)
        return (dataset[index * len(dataset) // count] for index in range(count))
    return itertools.islice(iter(dataset), _IMAGES)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Draw the same random numbers every time, and put the generators back: augmentations draw from them."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
