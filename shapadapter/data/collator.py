"""From rows of a data set to a batch: images prepared, labels checked, texts tokenized."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from shapadapter.core.errors import ImageError, ShapleyError, UnreadableImageError
from shapadapter.data.images import (
    DECODING_ERRORS,
    IMAGE_COLUMNS,
    IMAGE_INPUTS,
    image_column,
    image_side,
    is_damage,
    open_image,
    prepare_opened,
)
from shapadapter.data.labels import LABEL_COLUMNS, READY, ROW, LabelRules, as_row

TEXT_COLUMNS = ("text", "caption", "txt")

FAULT = "__fault__"
"""Column of a row that stands in for one whose image cannot be read: what is wrong with that."""
HOW_TO_SKIP = "To leave such images out, pass corrupt_images='skip' (at the command line --corrupt-images skip)."


@dataclass(frozen=True)
class TextRules:
    """What a matching model asks of its texts."""

    limit: int | None = None
    padded: bool = False


def text_rules(model: Any) -> TextRules:
    """The rules of a matching model, from its config."""
    config: Any = getattr(model.config, "text_config", None)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and getattr(config, "model_type", "") == "altclip_text_model":
        limit -= int(config.pad_token_id) + 1  # its positions start behind that of the padding
    return TextRules(limit, padded=getattr(model.config, "model_type", "") in ("siglip", "siglip2"))


def prepare_texts(texts: Sequence[str], processor: Any, rules: TextRules, truncate: bool = False) -> dict[str, Tensor]:
    """Tokenize."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if not callable(tokenizer) or not hasattr(tokenizer, "convert_tokens_to_ids"):
        raise ShapleyError(
            f"Texts need a tokenizer, {type(processor).__name__} has none. Pass the whole processor: "
            "AutoProcessor.from_pretrained(...)."
        )
    listed = [texts] if isinstance(texts, str) else list(texts)
    if not listed or not all(isinstance(text, str) for text in listed):
        raise ShapleyError(f"Expected at least one text, got {listed[:3]!r}.")
    lengths = [] if truncate or rules.limit is None else [len(ids) for ids in tokenizer(listed)["input_ids"]]
    for text, length in zip(listed, lengths, strict=False):
        if length > (rules.limit or 0):
            shown = text if len(text) <= 60 else f"{text[:57]}..."
            raise ShapleyError(f"The text {shown!r} has {length} tokens, the model takes {rules.limit}. Shorten it.")
    cut = {"truncation": True, "max_length": rules.limit} if rules.limit is not None else {}
    encoded = tokenizer(listed, padding="max_length" if rules.padded else True, return_tensors="pt", **cut)
    names = ("input_ids",) if rules.padded else ("input_ids", "attention_mask", "token_type_ids")
    return {name: encoded[name] for name in names if name in encoded}


class ImageCollator:
    """Turn rows with `image` and `label` columns into `pixel_values` (B, C, H, W) and `labels` (B,).

    Images may be PIL images, arrays, paths, or the content of files; `jpg`, `jpeg`, `png`, `webp` and `cls`, as
    webdataset shards name them, do as well. Rows that already hold `pixel_values` tensors (a transform made them) are
    stacked, and so are the floats that a transform has made in pairs (image, label), the rows of torchvision's data sets.
    Labels may be missing. For a model that matches images with texts there is a `text`, `caption` or `txt` column
    instead, one text for each image. Columns it has no use for are named in one warning.

    With `corrupt_images="skip"` a row whose image cannot be used is replaced by another of its batch, or a black image, and
    `readable` (B,) bool is False there, for whoever uses the batch to leave it out. So batches keep their size, which
    several processes need. The first one is named in a warning.

    Args:
        processor: the image processor, with texts the processor of both; needed unless rows hold `pixel_values`.
        texts: what the model asks of texts; None for a model without.
        truncate: whether to cut texts that are too long; else they are refused.
        corrupt_images: "fail" or "skip" where an image cannot be read.
        class_names: by index, for messages.
        labels: what the model's labels may be; None takes any numbers.
    """

    def __init__(
        self,
        processor: Any | None = None,
        texts: TextRules | None = None,
        truncate: bool = False,
        corrupt_images: Literal["fail", "skip"] = "fail",
        class_names: Mapping[int, str] | None = None,
        labels: LabelRules | None = None,
    ) -> None:
        self.processor = processor
        self.texts = texts
        self.truncate = truncate
        self.corrupt_images = corrupt_images
        self.class_names = class_names
        self.labels = labels
        self._warned = self._looked = False
        # Shared with data-loader workers, so that only one of them warns.
        self._named = (
            torch.zeros((), dtype=torch.bool, device="cpu").share_memory_() if corrupt_images == "skip" else None
        )

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate."""
        rows = [as_row(row) for row in rows]
        opened = [self._opened(row) for row in rows]
        try:
            batch = self._collated([row for row in opened if row is not None] or [_stand_in(rows[0])])
        except ImageError:
            if self.processor is None:
                raise
            opened = [row and self._opened(row, prepare=True) for row in opened]  # which says what row it is
            batch = self._collated([row for row in opened if row is not None] or [_stand_in(rows[0])])
        if self.corrupt_images == "fail":
            return batch
        readable = torch.tensor([row is not None for row in opened], device="cpu")  # (B,)
        places = (readable.cumsum(0) - 1).where(readable, 0)  # (B,) of each row among the readable ones, or the first
        return {**{name: value[places] for name, value in batch.items()}, "readable": readable}

    def _opened(self, row: dict[str, Any], prepare: bool = False) -> dict[str, Any] | None:
        """The row with its image opened, and if asked for prepared to see whether it can be; or None if it cannot be used."""
        try:
            if FAULT in row:
                raise UnreadableImageError(row[FAULT])
            if not prepare:
                return open_row(row)
            image_column(row)  # without one it is not the image's fault
            with usable():
                self._pixels([row])
            return row
        except UnreadableImageError as error:
            fault = row.get(FAULT) or named(str(error), row, self.class_names)
            if self._named is None:
                raise UnreadableImageError(f"{fault} {HOW_TO_SKIP}") from error
            if not self._named:
                self._named.fill_(True)
                warnings.warn(f"{fault} Such images are left out and counted as skipped_images.", stacklevel=4)
            return None

    def _collated(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        label = find_column(rows[0], self.labels.columns if self.labels else LABEL_COLUMNS)
        text = find_column(rows[0], TEXT_COLUMNS) if self.texts is not None else None
        self._warn_unused(set(rows[0]) - {*IMAGE_COLUMNS, label if self.texts is None else text, *IMAGE_INPUTS})
        batch: dict[str, Any] = self._pixels(rows)
        if self.texts is not None:
            return {**batch, **self._captions(rows, text, self.texts)}
        if label is not None:
            values = [row[label] for row in rows]
            batch["labels"] = self.labels.collated(values, label, rows) if self.labels else as_labels(values)
        return batch

    def _captions(self, rows: Sequence[dict[str, Any]], column: str | None, rules: TextRules) -> dict[str, Tensor]:
        if column is None:
            raise ShapleyError(
                f"The model matches images with texts: expected a text column named one of {TEXT_COLUMNS}, got columns "
                f"{sorted(rows[0])}."
            )
        return prepare_texts([row[column] for row in rows], self.processor, rules, self.truncate)

    def _pixels(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        if "pixel_values" in rows[0]:
            own = [name for name in IMAGE_INPUTS if name in rows[0]]
            if READY in rows[0] and self.processor is not None and not self._looked:
                _check_normalised(torch.stack([row["pixel_values"] for row in rows]), self.processor)
                self._looked = True
            return {name: _stacked(name, [_tensor(row[name]) for row in rows]) for name in own}
        if self.processor is None:
            raise ImageError(
                "Images need an image processor: pass processing_class=AutoImageProcessor.from_pretrained(...)."
            )
        images = [row[image_column(row)] for row in rows]
        return prepare_opened(images, self.processor)

    def _warn_unused(self, columns: set[Any]) -> None:
        unused = {column for column in columns if column is not None and not column.startswith("__")}
        if unused and not self._warned:
            warnings.warn(f"The collator does not use the columns {sorted(unused)}.", stacklevel=4)
            self._warned = True


def open_row(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its image opened."""
    if "pixel_values" in row:
        return row
    column = image_column(row)
    with usable():
        return {**row, column: open_image(row[column])}


@contextmanager
def usable() -> Iterator[None]:
    """Say of any image that cannot be used what is said of damaged ones; a disk or a network that fails is no image's fault."""
    try:
        yield
    except UnreadableImageError:
        raise
    except ImageError as error:
        cause = error.__cause__
        if isinstance(cause, DECODING_ERRORS) and not is_damage(cause):
            raise
        raise UnreadableImageError(str(error)) from error


def named(fault: str, row: Mapping[str, Any], class_names: Mapping[int, str] | None) -> str:
    """What is wrong with an image, with the row and the class it is in."""
    label = next((row[name] for name in LABEL_COLUMNS if name in row), None)
    known = (class_names or {}).get(label) if isinstance(label, int) else None
    parts = {"row": row.get(ROW), "key": row.get("__key__"), "class": label if known is None else repr(known)}
    found = ", ".join(f"{name} {value}" for name, value in parts.items() if value is not None)
    return f"{fault.rstrip('.')} ({found})." if found else f"{fault.rstrip('.')}."


def _stand_in(row: dict[str, Any]) -> dict[str, Any]:
    """A row that can be read, in the place of one of whose batch none can."""
    if "pixel_values" in row:
        return row
    return {**row, image_column(row): Image.new("RGB", (64, 64))}


def _stacked(name: str, values: list[Tensor]) -> Tensor:
    shapes = sorted({tuple(value.shape) for value in values})
    if len(shapes) > 1:
        raise ImageError(f"Expected {name} of one shape in a batch, got {shapes}. Resize the images to one size.")
    return torch.stack(values)  # (B, ...)


def _check_normalised(pixels: Tensor, processor: Any) -> None:
    """Refuse pairs whose transform has left out what the image processor does to every image."""
    side = image_side(processor)
    if not getattr(side, "do_normalize", False) or float(pixels.min()) < 0 or float(pixels.max()) > 1:
        return
    raise ImageError(
        "Expected pairs (image, label) whose transform makes floats ready for the model, got floats from 0 to 1: end the "
        f"transform with Normalize({list(side.image_mean)}, {list(side.image_std)}), or with PILToTensor() instead of "
        "ToTensor() to leave that to the image processor."
    )


def as_labels(values: list[Any]) -> Tensor:
    """Class indices (B,) int64, or regression targets and multi-hot rows in float32; `IGNORED` or NaN for None."""
    try:
        rows = [_tensor(torch.nan if value is None else value) for value in values]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapleyError(f"Expected labels as numbers, got {values[:3]!r}: {error}.") from error
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


def _tensor(value: Any) -> Tensor:
    """A tensor as it is, anything else as one on the CPU, whatever device is the default."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
