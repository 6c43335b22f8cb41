"""The labels of a data set: what a label may be, and which of them are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shapadapter.core.errors import ShapleyError

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
    """What the labels of a model may be."""

    classes: int
    problem: str | None = None
    columns: tuple[str, ...] = LABEL_COLUMNS

    def kind(self, several: bool) -> Kind:
        """What a label is: a class, several classes as a row of K zeros and ones, or a quantity."""
        if self.problem is None:
            return "quantity" if self.classes == 1 else "classes" if several else "class"
        return next((kind for kind, problem in PROBLEMS.items() if problem == self.problem), "class")

    def column(self, names: Any) -> str | None:
        """The column of labels among these."""
        return next((name for name in self.columns if name in names), None)

    def collated(self, values: Sequence[Any], column: str, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """Labels of a batch: classes (B,) int64 with `IGNORED`, or (B, K) or (B,) float32 with NaN, where unknown."""
        kind, numbers, known = self._checked(
            values, column, lambda place: {"row": rows[place].get(ROW), "key": rows[place].get("__key__")}
        )
        if kind == "class":
            return torch.from_numpy(np.where(known, numbers, IGNORED).astype(np.int64))  # (B,)
        return torch.from_numpy(np.where(known, numbers, np.nan).astype(np.float32))  # (B, K) or (B,)

    def check(self, values: Any, column: str) -> tuple[Kind, int]:
        """Refuse a column that holds something else than labels; what they are, and of how many rows some are known."""
        kind, _, known = self._checked(values, column, lambda place: {"row": place})
        return kind, int(known.reshape(len(known), -1).any(axis=1).sum())

    def count(self, inputs: Mapping[str, Any]) -> Tensor:
        """How many labels of a batch are known, (); one whose image could not be read counts, though it has no say."""
        labels, readable = inputs.get("labels"), inputs.get("readable")
        if not isinstance(labels, Tensor):
            return torch.zeros((), device="cpu")
        known = known_labels(labels, self.kind(several=False) == "quantity")  # (B,) or (B, K)
        if readable is not None:
            known = known | ~readable.view(-1, *[1] * (known.ndim - 1))
        return known.sum()

    def check_batch(self, labels: Tensor) -> None:
        """Refuse labels (B,) or (B, K) on the CPU of which one is none of this model."""
        self._checked(labels.detach().float().numpy(), "labels", lambda place: {"row of the batch": place})

    def _checked(
        self, values: Any, column: str, where: Callable[[int], Mapping[str, Any]]
    ) -> tuple[Kind, NDArray[Any], NDArray[Any]]:
        """What labels are, as numbers (n,) or (n, K), and which of them are known; `where` says which row one is in."""
        if isinstance(values, np.ndarray) and values.ndim in (1, 2) and values.dtype.kind in "iufb":
            kind, numbers = self.kind(values.ndim == 2), values.astype(np.float64)
        else:
            several = any(_length(value) is not None for value in values)
            kind, found = self.kind(several), []
            for place, value in enumerate(values):
                try:
                    found.append(self._numbers(value, several and kind != "class"))
                except ValueError:
                    raise self._refused(value, kind, column, where(place)) from None
            numbers = np.asarray(found, dtype=np.float64)  # (n,) or (n, K)
        known = ~np.isnan(numbers) & ((kind == "quantity") | ~np.isin(numbers, UNKNOWN))
        right = {
            "class": (numbers == np.floor(numbers)) & (numbers >= 0) & (numbers < self.classes),
            "classes": (numbers >= 0) & (numbers <= 1),
            "quantity": np.isfinite(numbers),
        }[kind]
        shape = () if kind == "class" else (self.classes,)
        fits = numbers.shape[1:] == shape or (numbers.ndim == 1 and self.classes == 1)
        wrong = (known & ~(right & fits)).reshape(len(numbers), -1).any(axis=1)  # (n,)
        if wrong.any() or (numbers.ndim == 2 and not fits):
            place = int(wrong.argmax())
            value = values[place].tolist() if isinstance(values, np.ndarray) else values[place]
            raise self._refused(value, kind, column, where(place))
        return kind, numbers, known

    def _numbers(self, value: Any, several: bool) -> float | list[float]:
        """One label as a number, or with `several` as K numbers; ValueError if it is none."""
        if _length(value) is not None:
            if not several or len(value) != self.classes:
                raise ValueError(value)
            return [_number(one) for one in value]
        number = _number(value)
        if not several:
            return number
        quantity = self.kind(several=True) == "quantity"
        unknown = math.isnan(number) or (not quantity and number in UNKNOWN)
        if not unknown and not (quantity and self.classes == 1):
            raise ValueError(value)
        return [number if quantity else math.nan] * self.classes  # nothing is known of the whole row

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


def as_shares(labels: Tensor, classes: int) -> Tensor:
    """Class indices (B,) as shares (B, K) of 0 and 1, all 0 where they are not known; shares as they are."""
    if labels.ndim == 2:
        return labels
    known = known_labels(labels, quantities=False)  # (B,)
    return torch.nn.functional.one_hot(labels.where(known, 0), classes) * known[:, None].float()  # (B, K)


def as_row(row: Any) -> dict[str, Any]:
    """A row as a dict: itself, or the pair (image, label) of torchvision's data sets.

    Floats that a transform has made of the image are ready for the model, as `Augmented` has it.
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
