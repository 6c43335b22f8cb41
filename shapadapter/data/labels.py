"""The labels of a data set as the model counts them: what a label may be, and classes that are the same if their names are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shapadapter.core.errors import ShapleyError
from shapadapter.data.classes import some

LABEL_COLUMNS = ("labels", "label", "cls")
IGNORED = -100
"""The label of an image without one, as torch's cross-entropy knows it."""
UNKNOWN = (-1, IGNORED)
"""Numbers that say of a class that it is not known; so do None and NaN."""
ROW = "__row__"
"""Column with the index of a row in its data set."""
READY = "__ready__"
"""Column that marks pixels which a transform of the data set's has made of an image."""

Kind = Literal["class", "classes", "quantity"]
PROBLEMS: dict[Kind, str] = {
    "class": "single_label_classification",
    "classes": "multi_label_classification",
    "quantity": "regression",
}
"""What transformers calls them."""


@dataclass(frozen=True)
class LabelRules:
    """What the labels of a model may be.

    Attributes:
        classes: K.
        problem: the model's `problem_type`; None where the first labels settle it.
        columns: where labels are looked for, the first first.
    """

    classes: int
    problem: str | None = None
    columns: tuple[str, ...] = LABEL_COLUMNS

    def kind(self, several: bool) -> Kind:
        """What a label is: a class, several classes as a row of K zeros and ones, or a quantity.

        Args:
            several: whether labels are rows of numbers, for a model that leaves it open.
        """
        if self.problem is None:
            return "quantity" if self.classes == 1 else "classes" if several else "class"
        return next((kind for kind, problem in PROBLEMS.items() if problem == self.problem), "class")

    def column(self, names: Any) -> str | None:
        """The column of labels among these."""
        return next((name for name in self.columns if name in names), None)

    def collated(self, values: Sequence[Any], column: str, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """Labels of a batch: classes (B,) int64 with `IGNORED`, or (B, K) or (B,) float32 with NaN, where unknown.

        Args:
            values: as the data set has them.
            column: they are from, for messages.
            rows: likewise.

        Raises:
            ShapleyError: one is no label of this model.
        """
        kind = self.kind(any(_length(value) is not None for value in values))
        found = []
        for value, row in zip(values, rows, strict=True):
            try:
                found.append(self._read(value, kind))
            except ValueError:
                raise self._refused(value, kind, column, {"row": row.get(ROW), "key": row.get("__key__")}) from None
        if kind == "class":
            return torch.tensor(found, device="cpu")  # (B,)
        wide = next((one for one in found if isinstance(one, list)), None)
        if wide is not None:
            found = [one if isinstance(one, list) else [one] * len(wide) for one in found]
        return torch.tensor(found, dtype=torch.float32, device="cpu")  # (B, K) or (B,)

    def check(self, values: Any, column: str) -> tuple[Kind, int]:
        """Refuse a column of a data set that holds something else than labels.

        Args:
            values: (n,) of all rows, or a list.
            column: their name.

        Returns:
            What they are, and how many are known in full or in part.

        Raises:
            ShapleyError: one is no label of this model; with its row.
        """
        if isinstance(values, np.ndarray) and values.ndim in (1, 2) and values.dtype.kind in "iufb":
            return self._check_numbers(values, column, "row")
        kind = self.kind(any(_length(value) is not None for value in values))
        count = 0
        for place, value in enumerate(values):
            try:
                read = self._read(value, kind)
            except ValueError:
                raise self._refused(value, kind, column, {"row": place}) from None
            count += any(
                not math.isnan(one) and one != IGNORED for one in (read if isinstance(read, list) else [read])
            )
        return kind, count

    def check_batch(self, labels: Tensor) -> None:
        """Refuse labels (B,) or (B, K) on the CPU of which one is none of this model.

        Raises:
            ShapleyError: there is one.
        """
        self._check_numbers(labels.detach().float().numpy(), "labels", "row of the batch")

    def _check_numbers(self, values: NDArray[Any], column: str, row: str) -> tuple[Kind, int]:
        """`check` of numbers (n,) or (n, C)."""
        kind, numbers = (
            self.kind(values.ndim == 2),
            values.astype(np.float64).reshape(len(values), -1),
        )  # (n, 1) or (n, C)
        known = ~np.isnan(numbers) & ((kind == "quantity") | ~np.isin(numbers, UNKNOWN))
        right = {
            "class": (numbers == np.floor(numbers)) & (numbers >= 0) & (numbers < self.classes),
            "classes": (numbers >= 0) & (numbers <= 1),
            "quantity": np.isfinite(numbers),
        }[kind]
        fits = values.ndim == 1 if kind == "class" else numbers.shape[1] == self.classes
        bad = (known & ~(right & fits)).any(axis=1) | (values.ndim == 2 and not fits)  # (n,)
        if bad.any():
            place = int(bad.argmax())
            raise self._refused(values[place].tolist(), kind, column, {row: place})
        return kind, int(known.any(axis=1).sum())

    def _read(self, value: Any, kind: Kind) -> int | float | list[float]:
        """One label; ValueError if it is none."""
        if _length(value) is None:
            number = _number(value)
            if kind == "class":
                return self._class(number)
            if kind == "classes" and number in UNKNOWN:
                return math.nan  # nothing is known of the whole row
            if math.isnan(number) or (kind == "quantity" and self.classes == 1 and math.isfinite(number)):
                return number
            raise ValueError(value)
        numbers = [_number(one) for one in value]
        if len(numbers) != self.classes or kind == "class" or any(math.isinf(number) for number in numbers):
            raise ValueError(value)
        if kind == "quantity":
            return numbers
        numbers = [math.nan if number in UNKNOWN else number for number in numbers]
        if any(not (math.isnan(number) or 0 <= number <= 1) for number in numbers):
            raise ValueError(value)
        return numbers

    def _class(self, number: float) -> int:
        if math.isnan(number) or number in UNKNOWN:
            return IGNORED
        if not 0 <= number < self.classes or number != int(number):  # 2.0 is one, as a csv with holes has it
            raise ValueError(number)
        return int(number)

    def _refused(self, value: Any, kind: Kind, column: str, place: Mapping[str, Any]) -> ShapleyError:
        where = ", ".join(f"{name} {one}" for name, one in place.items() if one is not None)
        wanted = {
            "class": f"a class from 0 to {self.classes - 1}",
            "classes": f"several labels as a row of zeros and ones, one number for each of {self.classes} classes",
            "quantity": "a finite number" if self.classes == 1 else f"{self.classes} finite numbers",
        }[kind]
        unknown = "None or NaN" if kind == "quantity" else "-1, -100, None or NaN"
        remedy = ""
        if isinstance(value, str | bytes):
            remedy = f" Number the names first, e.g. dataset.class_encode_column({column!r})."
        elif kind == "classes" and _length(value) == 1:
            remedy = " The one class of an image is a number, not a list."
        elif kind == "class" and _length(value) == self.classes > 1:
            remedy = ' Several labels of an image need a base with problem_type="multi_label_classification".'
        shown = repr(value.item() if isinstance(value, np.generic) else value)
        shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
        return ShapleyError(
            f"Expected {wanted} as the label of each image ({unknown} if it is not known), got {shown} "
            f"({where}{', ' if where else ''}column {column!r}).{remedy}"
        )


def _length(value: Any) -> int | None:
    """How many numbers a label is; None for a single one."""
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__") or getattr(value, "ndim", 1) == 0:
        return None
    return len(value)


def _number(value: Any) -> float:
    """A number as Python has it, NaN for None; ValueError if it is none."""
    if value is None:
        return math.nan
    if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, Real | np.bool_):
        raise ValueError(value)
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(value) from error


def known_labels(labels: Tensor, quantities: bool) -> Tensor:
    """Which of the labels (B,) or (B, K) are known, bool; of quantities, every number is."""
    known = labels == labels  # not so of NaN
    return known if quantities else known & (labels != UNKNOWN[0]) & (labels != UNKNOWN[1])


def as_row(row: Any) -> dict[str, Any]:
    """A row as a dict: itself, or the pair (image, label) of torchvision's data sets.

    Floats that a transform has made of the image are ready for the model, as `Augmented` has it.

    Raises:
        ShapleyError: it is neither.
    """
    if isinstance(row, Mapping):
        return dict(row)
    if not isinstance(row, tuple | list) or len(row) != 2:
        came = f"{type(row).__name__} of {len(row)}" if isinstance(row, tuple | list) else type(row).__name__
        raise ShapleyError(
            f"Expected rows as dicts with an image and a label, or as pairs (image, label), got a {came}."
        )
    image, label = row
    if isinstance(image, Tensor) and image.is_floating_point():
        return {"pixel_values": image, "label": label, READY: True}
    return {"image": image, "label": label}


class Relabelled:
    """A data set whose labels are counted as the model counts them.

    Args:
        dataset: rows by index.
        column: of the labels.
        numbers: of each of the data set's classes, its index in the model.
    """

    def __init__(self, dataset: Any, column: str, numbers: Sequence[int]) -> None:
        self.dataset = dataset
        self.column = column
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _relabelled(as_row(self.dataset[index]), self.column, self.numbers, index)

    def set_epoch(self, epoch: int) -> None:
        """Tell the data set, if it wants to know."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def _relabelled(row: dict[str, Any], column: str, numbers: Sequence[int], index: int | None = None) -> dict[str, Any]:
    if column in row:  # a transform may have taken it away
        row[column] = LabelRules(len(numbers)).collated([row[column]], column, [{ROW: index}])[0].item()
        if row[column] != IGNORED:
            row[column] = numbers[row[column]]
    return row


def as_model_counts(
    dataset: Any, names: Mapping[int, str] | None, remedy: str, columns: Sequence[str] = LABEL_COLUMNS
) -> Any:
    """The data set with the labels that the model gives to classes of these names.

    A folder of images, say, numbers its classes by the alphabet. Labels are left as they are where the data set does not
    name them, where either side has numbers for names, and where the names stand in the model's order.

    Args:
        dataset: rows by index, or a stream of `datasets`; what names its classes is a `ClassLabel` of `datasets`, or
            `classes` of a data set of torchvision.
        names: of the model's classes, by index.
        remedy: what to do about classes that the model does not have.
        columns: where labels are looked for.

    Raises:
        ShapleyError: there are classes that the model does not have.
    """
    column, own = named_classes(dataset, columns)
    model = [str(names[index]) for index in sorted(names)] if names else []
    if column is None or len(model) < 2 or own == model[: len(own)] or are_numbers(own) or are_numbers(model):
        return dataset
    strangers = [name for name in own if name not in model]
    if strangers:
        raise ShapleyError(
            f"The classes {_some(strangers)} of the data's column {column!r} are no classes of the model. Its classes are "
            f"{_some(model)}. {remedy}"
        )
    # A name that the model has twice (ImageNet's cranes) means the class in the same place.
    same = [model[index : index + 1] == [name] for index, name in enumerate(own)]
    numbers = [i if same[i] else model.index(name) for i, name in enumerate(own)]
    if not hasattr(dataset, "__len__"):  # a stream
        # Its ClassLabel has other numbers for these names; the names are taken off, so that nobody counts twice.
        features = dataset.features.copy()
        features[column] = type(features[column])(num_classes=max(len(model), len(own)))
        return dataset.map(partial(_relabelled, column=column, numbers=numbers), features=features)
    return Relabelled(dataset, column, numbers)


def named_classes(dataset: Any, columns: Sequence[str] = LABEL_COLUMNS) -> tuple[str | None, list[str]]:
    """The column of labels and the names of its classes, if it has names."""
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):
        column = next((name for name in columns if name in features), None)
        names = getattr(features.get(column), "names", None) or []
        return (column, [str(name) for name in names]) if names else (None, [])
    if isinstance(dataset, torch.utils.data.Subset):
        return named_classes(dataset.dataset, columns)
    classes = getattr(dataset, "classes", None)  # of torchvision, whose rows are pairs
    if isinstance(classes, list | tuple) and classes and all(isinstance(name, str) for name in classes):
        return "label", list(classes)
    return None, []


def are_numbers(names: Sequence[str]) -> bool:
    """Whether nobody has given names: LABEL_0, LABEL_1, ... or 0, 1, ..."""
    return all(name in (f"LABEL_{index}", str(index)) for index, name in enumerate(names))


def _some(names: Sequence[str]) -> str:
    return f"[{some(map(repr, names))}]"
