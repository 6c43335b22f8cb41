"""Rows of a data set by index, as the model takes them, and of a folder of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers.image_processing_base import ImageProcessingMixin
from transformers.processing_utils import ProcessorMixin

from shapadapter.core.errors import ImageError, ShapleyError
from shapadapter.data.classes import as_model_counts
from shapadapter.data.collator import ImageCollator
from shapadapter.data.images import IMAGE_COLUMNS, IMAGE_INPUTS
from shapadapter.data.labels import LABEL_COLUMNS, READY, ROW, LabelRules, as_row

MASKS = "mask"
"""The column in which masks are looked for, and not missed, where no other is named."""


REMEDY = (
    "Give the data the model's names: dataset.cast_column(\"label\", ClassLabel(names=[...])), in the order of the data's "
    "numbers."
)


class Batch(NamedTuple):
    """Inputs of a few images, `pixel_values` (B, C, H, W) among them, and their labels (B,), (B, K) or None."""

    inputs: dict[str, Tensor]
    labels: Tensor | None


class Rows:
    """A data set whose rows are collated as in training.

    What the data names like the model's `names` is counted as the model does; `labels` says what labels may be, None takes
    any numbers. In place of the processor there may be a collator of the user's.
    """

    def __init__(
        self,
        dataset: Any,
        processor: Any | None,
        names: Mapping[int, str] | None = None,
        labels: LabelRules | None = None,
    ) -> None:
        if isinstance(dataset, Mapping) and not hasattr(dataset, "features"):
            if set(IMAGE_COLUMNS) & dataset.keys():
                raise ShapleyError("Expected a data set, got a single row: pass a list of rows, [row].")
            raise ShapleyError(
                f"Expected a data set, got splits of one: choose a split, e.g. data[{next(iter(dataset), 'test')!r}]."
            )
        listed = hasattr(dataset, "__getitem__") and not isinstance(dataset, str | bytes)
        if not listed or not hasattr(dataset, "__len__") or not len(dataset):
            raise ShapleyError(
                "Expected a data set with a length and rows by index, such as datasets.Dataset or a list of dicts, got "
                f"{'an empty' if listed and hasattr(dataset, '__len__') else 'a'} {type(dataset).__name__}."
            )
        if not isinstance(dataset[0], Mapping | tuple):
            raise ShapleyError(
                f"Expected rows with an image column, got {type(dataset[0]).__name__}: pass [{{'image': image}}, ...]."
            )
        self.dataset = dataset
        self.counted = as_model_counts(dataset, names, REMEDY)
        own = processor is not None and not isinstance(processor, ImageProcessingMixin | ProcessorMixin)
        if own and not callable(processor):
            raise ShapleyError(f"Expected an image processor or a collator, got {type(processor).__name__}.")
        self.collate: Callable[..., dict[str, Any]] = processor if own else ImageCollator(processor, labels=labels)  # type: ignore[assignment]
        self.processor = getattr(processor, "processor", None) if own else processor

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows of these indices."""
        rows = [self.counted[index] for index in indices]
        if isinstance(self.collate, ImageCollator):
            rows = [{**as_row(row), ROW: index} for row, index in zip(rows, indices, strict=True)]
            known = {*IMAGE_COLUMNS, *LABEL_COLUMNS, *IMAGE_INPUTS, ROW, READY}
            if self.processor is None and "pixel_values" not in rows[0] and set(IMAGE_COLUMNS) & set(rows[0]):
                raise ImageError(
                    "Images need an image processor: pass processor=AutoImageProcessor.from_pretrained(...)."
                )
            rows = [{name: value for name, value in row.items() if name in known} for row in rows]
        found = self.collate(rows)
        return Batch({name: found[name] for name in IMAGE_INPUTS if name in found}, found.get("labels"))

    def column(self, name: str, indices: Sequence[int]) -> list[Any]:
        """One column of these rows; images in other columns are not decoded for it, where that can be helped."""
        dataset = self.dataset
        if name in (getattr(dataset, "column_names", None) or ()) and hasattr(dataset, "select_columns"):
            dataset = dataset.with_format(None).select_columns([name])
        return [as_row(dataset[index])[name] for index in indices]

    def mask(self, name: str, index: int) -> NDArray[np.bool_]:
        """The pixel mask (H, W) in a column of a row: a picture, an array or a path; what is not 0 is the object."""
        (found,) = self.column(name, [index])
        if isinstance(found, str | Path):
            with Image.open(found) as file:
                found = file.copy()
        pixels = np.asarray(found)
        if pixels.ndim == 3 and pixels.shape[0] == 1:
            pixels = pixels[0]  # (1, H, W) -> (H, W), as torch has pictures
        elif pixels.ndim == 3 and pixels.shape[-1] <= 4:
            opaque = 1 if pixels.shape[-1] in (2, 4) else 0  # how much of an object a picture is, alpha does not say
            pixels = pixels[..., : pixels.shape[-1] - opaque].max(axis=-1)  # (H, W, C) -> (H, W)
        if pixels.ndim != 2:
            raise ShapleyError(
                f"Expected a mask (H, W) in the column {name!r} of row {index}, a picture, an array or a path, got "
                f"{type(found).__name__} of shape {pixels.shape}."
            )
        return pixels > 0

    def masks(self, name: str | None) -> str | None:
        """The column of masks: the one that is named, else `MASKS` if the rows have it."""
        if self.has(name or MASKS):
            return name or MASKS
        if name is not None:
            raise ShapleyError(f"The data has no column {name!r} for masks.")
        return None

    def groups(self, name: str | None) -> Tensor | None:
        """Numbers for the values of a column, whatever they are: (R,) int64; None where no column is named."""
        if name is None:
            return None
        if not self.has(name):
            raise ShapleyError(f"The data has no column {name!r} for groups.")
        values = self.column(name, range(len(self)))
        known = {value: number for number, value in enumerate(dict.fromkeys(values))}
        return torch.tensor([known[value] for value in values], device="cpu")

    def has(self, name: str) -> bool:
        """Whether the rows have a column."""
        return name in as_row(self.dataset[0])


def choose(count: int, wanted: int, seed: int) -> list[int]:
    """`wanted` of `count` rows, drawn without replacement; fewer are a part of more."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")  # (count,)
    return sorted(order[:wanted].tolist())


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def labelled_images(data: Path, labels: list[str], masks: Path | None) -> list[dict[str, Any]]:
    """A row for each image of a folder with a subfolder for each class, with its mask at the same relative path."""
    images = [
        (path, folder.name)
        for folder in sorted(path for path in data.iterdir() if path.is_dir())
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not images:
        raise ShapleyError(
            f"Expected {data} to hold a subfolder of images for each class, e.g. {data}/{labels[0]}/1.png."
        )
    strangers = sorted({name for _, name in images} - set(labels))
    if strangers:
        raise ShapleyError(
            f"The subfolders {strangers[:5]} of {data} are no classes of the model. Its classes are {labels[:10]}"
            f"{' ...' if len(labels) > 10 else ''}."
        )
    rows: list[dict[str, Any]] = []
    for path, name in images:
        rows.append({"image": str(path), "label": labels.index(name)})
        if masks is not None:
            mask = (masks / path.relative_to(data)).with_suffix(".png")
            if not mask.is_file():
                raise ShapleyError(f"There is no mask {mask} for {path}.")
            rows[-1]["mask"] = str(mask)
    return rows
