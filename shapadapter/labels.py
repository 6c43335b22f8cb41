"""The labels of a data set as the model counts them: classes are the same if their names are, not their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from .errors import ShapleyError

LABEL_COLUMNS = ("labels", "label", "cls")


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
        return self.relabelled(dict(self.dataset[index]))

    def relabelled(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of the data set with the model's label."""
        return _relabelled(row, self.column, self.numbers)

    def set_epoch(self, epoch: int) -> None:
        """Tell the data set, if it wants to know."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def _relabelled(row: dict[str, Any], column: str, numbers: Sequence[int]) -> dict[str, Any]:
    label = row.get(column)  # a transform may have taken it away
    if label is not None and label >= 0:  # -1 stands for unknown
        row[column] = numbers[int(label)]
    return row


def as_model_counts(dataset: Any, names: Mapping[int, str] | None, remedy: str) -> Any:
    """The data set with the labels that the model gives to classes of these names.

    A folder of images, say, numbers its classes by the alphabet. Labels are left as they are where the data set does not
    name them, where either side has numbers for names, and where the names stand in the model's order.

    Args:
        dataset: rows by index, or a stream of `datasets`; what names its classes is a `ClassLabel` of `datasets`.
        names: of the model's classes, by index.
        remedy: what to do about classes that the model does not have.

    Raises:
        ShapleyError: there are classes that the model does not have.
    """
    column, own = _named(dataset)
    model = [str(names[index]) for index in sorted(names)] if names else []
    if column is None or len(model) < 2 or own == model[: len(own)] or _are_numbers(own) or _are_numbers(model):
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


def names_for_numbers(dataset: Any, names: Mapping[int, str] | None) -> dict[int, str] | None:
    """The names that a data set has for the classes of a model which calls them LABEL_0, LABEL_1, ...

    Args:
        dataset: what names its classes is a `ClassLabel` of `datasets`.
        names: of the model's classes, by index.

    Returns:
        As many names as the model has classes, by index; None where the data set has others, or the model its own.
    """
    _, own = _named(dataset)
    nameless = [f"LABEL_{index}" for index in range(len(own))]
    if not own or _are_numbers(own) or [str(name) for name in (names or {}).values()] != nameless:
        return None
    return dict(enumerate(own))


def _named(dataset: Any) -> tuple[str | None, list[str]]:
    """The column of labels and the names of its classes, if it has names."""
    features = getattr(dataset, "features", None)
    if not isinstance(features, Mapping):
        return None, []
    for column in LABEL_COLUMNS:
        names = getattr(features.get(column), "names", None)
        if names:
            return column, [str(name) for name in names]
    return None, []


def _are_numbers(names: Sequence[str]) -> bool:
    """Whether nobody has given names: LABEL_0, LABEL_1, ... or 0, 1, ..."""
    return all(name in (f"LABEL_{index}", str(index)) for index, name in enumerate(names))


def _some(names: Sequence[str]) -> str:
    return f"[{', '.join(map(repr, names[:10]))}{', ...' if len(names) > 10 else ''}]"
