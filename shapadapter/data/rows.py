"""Rows of data sets whose images may be damaged: named, or left out without stopping a run."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import suppress
from dataclasses import replace
from functools import wraps
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, Subset
from transformers import EvalPrediction

from shapadapter.core.errors import ImageError, ShapleyError, UnreadableImageError
from shapadapter.data.augmentation import Augmented
from shapadapter.data.classes import Relabelled, is_transformed
from shapadapter.data.collator import FAULT, HOW_TO_SKIP, ImageCollator, named, open_row
from shapadapter.data.images import DECODING_ERRORS, IMAGE_COLUMNS, image_column, is_damage
from shapadapter.data.labels import IGNORED, ROW, as_row


def some_rows(dataset: Any, count: int) -> Iterator[Any]:
    """Up to `count` rows, evenly spread from the first to the last; of a stream, which has no length, the first ones."""
    streamed = isinstance(dataset, IterableDataset)  # which has the method of data sets by index, but it only raises
    if not streamed and isinstance(dataset, Sized) and hasattr(dataset, "__getitem__"):
        count = min(len(dataset), count)
        # From end to end: a whole share of the length as the step would meet one class only where classes take turns.
        return (dataset[index * (len(dataset) - 1) // max(1, count - 1)] for index in range(count))
    return itertools.islice(iter(dataset), count)


_USUAL = ("RGB", "L", "RGBA", "P", "CMYK", "YCbCr", "1")

GLANCES = 20_000
"""Images that are looked at before a training: of more, so many."""


class GuardedRows:
    """A data set by index that says which row it cannot read.

    With "skip" such a row comes as the next one that can be read, with what is wrong in the column `FAULT`; the collator
    marks it, and who does not look at that column, like an evaluator, has an image all the same.
    """

    def __init__(
        self, dataset: Any, corrupt_images: Literal["fail", "skip"], class_names: Mapping[int, str] | None
    ) -> None:
        self.dataset = dataset
        self.corrupt_images = corrupt_images
        self.class_names = class_names
        self._files: Any = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):  # while it is copied into a worker
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: int) -> Any:
        return self._item(index)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """The rows of a batch, at once where the data set can: a transform of `datasets` sees whole batches."""
        rows: list[Any] = [None] * len(indices)
        if hasattr(self.dataset, "__getitems__"):
            with suppress(UnreadableImageError, *DECODING_ERRORS):  # which the rows one by one tell again
                rows = self.dataset.__getitems__(indices)
        return [self._item(index, row) for index, row in zip(indices, rows, strict=True)]

    def look(self, first: int = 0, step: int = 1) -> None:
        """Look at the heads of up to `GLANCES` files, evenly spread, without decoding them."""
        files = [] if is_transformed(self.dataset) else self._undecoded()
        count = min(len(self), GLANCES)
        for place in range(first, count if len(files) else 0, step):
            index = place * (len(self) - 1) // max(1, count - 1)
            if is_doubtful(as_row(files[index])):
                self._item(index)  # which says what is wrong

    def _undecoded(self) -> Any:
        if self._files is None:
            self._files = _undecoded(self.dataset)
        return self._files

    def _item(self, index: int, row: Any = None) -> Any:
        try:
            return self._read(index, row)
        except UnreadableImageError as error:
            if self.corrupt_images == "fail":
                raise
            return {**self._next(index), FAULT: str(error)}

    def _read(self, index: int, row: Any) -> Any:
        row, fault = self._attempt(index, row)
        if fault is None:
            return row
        files = self._undecoded()
        row = {**as_row(files[index] if files else row), ROW: index}
        try:
            open_row(row)
        except UnreadableImageError as error:
            fault = str(error)  # which names the file
        except ImageError:
            pass
        fault = named(fault, row, self.class_names)
        raise UnreadableImageError(fault if self.corrupt_images == "skip" else f"{fault} {HOW_TO_SKIP}")

    def _attempt(self, index: int, known: Any = None) -> tuple[Any, str | None]:
        """The row, perhaps read already, with its image opened, and what is wrong with it."""
        row: Any = {}
        try:
            row = {**as_row(self.dataset[index] if known is None else known), ROW: index}
            return open_row(row) if any(name in row for name in IMAGE_COLUMNS) else row, None
        except UnreadableImageError as error:
            return row, str(error)
        except DECODING_ERRORS as error:  # the data set opens its images itself
            if not is_damage(error):
                raise
            return row, f"Cannot read image: {error}"

    def _next(self, index: int) -> dict[str, Any]:
        for step in range(1, len(self)):
            row, fault = self._attempt((index + step) % len(self))
            if fault is None:
                return row
        raise UnreadableImageError(f"None of the {len(self)} images of the data set can be read.")


def is_doubtful(row: Mapping[str, Any]) -> bool:
    """Whether the image of a row may be of no use: its file has no head of an image, or it is of a rare kind."""
    column = next((name for name in IMAGE_COLUMNS if name in row), None)
    image: Any = None if column in (None, "pixel_values") else row[image_column(dict(row))]
    if isinstance(image, Mapping):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if column in (None, "pixel_values") or isinstance(image, Tensor) or (isinstance(image, str) and "://" in image):
        return False
    if isinstance(image, Image.Image):
        return image.mode not in _USUAL
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as file:
            return file.mode not in _USUAL
    except Exception:  # whatever it is, opening the row says it better
        return True


def _undecoded(dataset: Any) -> Any:
    """The rows with files as they are; an empty list for a data set that does not show them."""
    if isinstance(dataset, Subset):
        files = _undecoded(dataset.dataset)
        return [files[index] for index in dataset.indices] if files else []
    if isinstance(dataset, Relabelled):
        return Relabelled(_undecoded(dataset.dataset), dataset.column, dataset.numbers)
    if isinstance(dataset, Augmented):
        return _undecoded(dataset.dataset)
    if isinstance(samples := getattr(dataset, "samples", None), list):  # of torchvision's folders
        return samples if hasattr(dataset, "loader") else []
    features = getattr(dataset, "features", None)
    if not isinstance(features, Mapping) or not hasattr(dataset, "cast_column"):
        return dataset if isinstance(dataset, list) else []
    dataset = dataset.with_format(None)
    for column, feature in features.items():
        if getattr(feature, "decode", False):
            dataset = dataset.cast_column(column, replace(feature, decode=False))
    return dataset


def guarded(
    dataset: Any, collator: Any, corrupt_images: Literal["fail", "skip"], class_names: Mapping[int, str] | None
) -> Any:
    """The data set, whose rows are named when they cannot be read; a stream or another's collator's rows as they are."""
    streamed = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")
    if streamed or not isinstance(collator, ImageCollator):
        return dataset
    return GuardedRows(dataset, corrupt_images, class_names)


def check_skipping(collator: Any) -> None:
    """Refuse to skip images that somebody else opens."""
    if not isinstance(collator, ImageCollator) or collator.corrupt_images != "skip":
        raise ShapleyError(
            "corrupt_images='skip' needs the trainer's own data_collator, or ImageCollator(processor, "
            f"corrupt_images='skip'); got {type(collator).__name__}."
        )


def readable_rows(inputs: dict[str, Any]) -> tuple[dict[str, Any], int, int]:
    """The rows of a batch whose images could be read."""
    readable = inputs.get("readable")
    rest = {name: value for name, value in inputs.items() if name != "readable"}
    count = len(inputs["pixel_values"])
    if readable is None:
        return rest, count, count
    rows = readable.nonzero()[:, 0]  # (R,)
    if len(rows) == count:
        return rest, count, count
    kept = rows if len(rows) else torch.zeros(1, dtype=torch.long, device=rows.device)
    return {name: value[kept] if _is_of(value, count) else value for name, value in rest.items()}, len(rows), count


def _is_of(value: Any, images: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == images


def in_place(logits: Tensor | None, labels: Tensor | None, readable: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Logits of the readable images in the places of all, so that predictions remain in the order of the rows."""
    if logits is not None:
        found = logits.new_full((len(readable), *logits.shape[1:]), torch.nan)
        found[readable] = logits[: int(readable.sum())]
        logits = found
    if labels is not None:
        labels = labels.clone()
        labels[~readable] = torch.nan if labels.is_floating_point() else IGNORED
    return logits, labels


def of_known(compute_metrics: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The user's metrics, of the images that could be read and have a label; none where there is no such image."""

    @wraps(compute_metrics)  # transformers looks at its arguments
    def compute(evaluation: Any, **options: Any) -> dict[str, Any]:
        predictions, labels = evaluation.predictions, evaluation.label_ids
        batches = isinstance(labels, list)  # eval_do_concat_batches=False: an array for each batch
        each = list(map(_are_known, labels if batches else [labels]))
        if all(one.all() for one in each):
            return compute_metrics(evaluation, **options)
        if not options and not any(one.any() for one in each):
            return {}
        kept = each if batches else each[0]
        parts = (predictions, labels, evaluation.inputs, evaluation.losses)
        predictions, labels, inputs, losses = (_rows_of(part, kept) for part in parts)
        return compute_metrics(EvalPrediction(predictions, labels, inputs=inputs, losses=losses), **options)

    return compute


def _are_known(labels: Any) -> Any:
    """Which rows have a label, or several of which one is known, (rows,) bool; `in_place` takes it from unreadable ones."""
    flat = labels.reshape(len(labels), -1)  # (rows, 1) or (rows, K)
    module: Any = torch if isinstance(labels, Tensor) else np
    return ~(module.isnan(flat) if "float" in str(labels.dtype) else flat == IGNORED).all(1)


def _rows_of(values: Any, kept: Any) -> Any:
    """The rows `kept` (rows,) of arrays, and of those in lists, tuples and dicts; lists of batches by lists."""
    if isinstance(values, Mapping):
        return {name: _rows_of(value, kept) for name, value in values.items()}
    if isinstance(kept, list) and isinstance(values, list):
        return [_rows_of(value, own) for value, own in zip(values, kept, strict=True)]
    if isinstance(values, list | tuple):
        return type(values)(_rows_of(value, kept) for value in values)
    return values[kept] if getattr(values, "ndim", 0) > 0 and len(values) == len(kept) else values
