"""How much of the images a training never sees."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch.utils.data import IterableDataset

from shapadapter.augmenting import seeded
from shapadapter.collator import ImageCollator
from shapadapter.errors import ImageError
from shapadapter.frames import frames, unseen
from shapadapter.images import DECODING_ERRORS, image_side, open_image, prepare_opened

_IMAGES = 16


def warn_of_crops(dataset: Any, collator: Any) -> None:
    """Warn where the image processor cuts off 1 % or more, on average over a few images spread over the data set.

    Args:
        dataset: rows by index; a stream is left alone.
        collator: what makes batches of them; its image processor is asked.
    """
    processor = image_side(getattr(collator, "processor", None))
    listed = (
        hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)
    )
    if processor is None or not isinstance(collator, ImageCollator) or not listed:
        return
    shares: list[float] = []
    shape = (0, 0)
    count = min(len(dataset), _IMAGES)
    for place in range(count):
        with seeded(0), suppress(ImageError, *DECODING_ERRORS):  # of which the training tells
            row = dataset[place * (len(dataset) - 1) // max(1, count - 1)]
            if isinstance(row, Mapping) and "pixel_values" in row:
                return
            image = open_image(row)
            pixels = prepare_opened([image], processor)["pixel_values"]
            if pixels.ndim != 4:  # patches of a whole image
                return
            shape = (pixels.shape[2], pixels.shape[3])
            shares += unseen(frames([image], processor, shape)).tolist()
    share = torch.tensor(shares, device="cpu").nanmean().item()
    if share >= 0.01:
        size = {"height": shape[0], "width": shape[1]}
        remedy = f" To keep it, load the processor with do_center_crop=False, size={size}."
        warnings.warn(
            f"On average {100 * share:.0f} % of an image's area is cut off by the center crop of "
            f"{type(processor).__name__}, and neither training nor explanations see it."
            + (remedy if getattr(processor, "do_center_crop", False) else ""),
            stacklevel=3,
        )
