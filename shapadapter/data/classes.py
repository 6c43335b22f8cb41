"""Classes by their names: those of a model, and those of a data set counted as the model counts them."""

import operator
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, Subset

from shapadapter.core.documents import fault
from shapadapter.core.errors import ClassNotFoundError, FieldError, ShapleyError
from shapadapter.core.phrases import did_you_mean, some
from shapadapter.data.augmentation import Augmented, seeded
from shapadapter.data.labels import IGNORED, LABEL_COLUMNS, ROW, LabelRules, as_row


def check_names(names: Any, field: str) -> None:
    """Refuse names that are no texts, or none that can be written as UTF-8."""
    if trouble := fault(names, list[str], field):
        raise FieldError(f"{trouble}.")


def class_names(id2label: Mapping[Any, Any] | None, classes: int) -> tuple[str, ...]:
    """The names of a model's K classes, in their order."""
    if not id2label:
        return tuple(f"LABEL_{index}" for index in range(classes))
    try:
        names = {int(index): str(name) for index, name in id2label.items()}
    except (TypeError, ValueError):
        names = {}
    if len(names) != len(id2label) or set(names) != set(range(classes)):
        raise ShapleyError(
            f"Expected id2label to name the {classes} classes of the model by the indices 0 to {classes - 1}, got those of "
            f"{some(map(repr, id2label))}. Set id2label=dict(enumerate(names)) and label2id={{name: index for index, name "
            "in enumerate(names)}, in the order of the model's outputs."
        )
    return tuple(names[index] for index in range(classes))


def find_classes(labels: Sequence[str], wanted: Any) -> list[int]:
    """The indices of a class or several, by names or indices; arrays and numbers of NumPy and torch do as well."""
    wanted = wanted.tolist() if hasattr(wanted, "tolist") else wanted
    several = wanted if hasattr(wanted, "__iter__") and not isinstance(wanted, str) else [wanted]
    return [find_class(labels, one) for one in several]


def find_class(labels: Sequence[str], name_or_id: str | int) -> int:
    """Find a class by its name, or check its index."""
    if not isinstance(name_or_id, str):
        try:
            index = operator.index(name_or_id)
        except TypeError:
            index = -1
        if 0 <= index < len(labels):
            return index
        raise ClassNotFoundError(f"There is no class {name_or_id}: the classes are 0..{len(labels) - 1}.")
    found = [index for index, label in enumerate(labels) if label == name_or_id]
    if len(found) == 1:
        return found[0]
    if found:
        raise ClassNotFoundError(f"Several classes are called {name_or_id!r}: pass one of the ids {found}.")
    hint = did_you_mean(name_or_id, labels, otherwise=f"The classes are {some(labels)}.")
    raise ClassNotFoundError(f"There is no class {name_or_id!r}. {hint}")


class Relabelled:
    """A data set whose labels are counted as the model counts them."""

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
    """
    column, own = named_classes(dataset, columns)
    model = [str(names[index]) for index in sorted(names)] if names else []
    if column is None or len(model) < 2 or own == model[: len(own)] or are_numbers(own) or are_numbers(model):
        return dataset
    strangers = [name for name in own if name not in model]
    if strangers:
        raise ShapleyError(
            f"The classes [{some(map(repr, strangers))}] of the data's column {column!r} are no classes of the model. Its classes are "
            f"[{some(map(repr, model))}]. {remedy}"
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
    if isinstance(dataset, Subset):
        return named_classes(dataset.dataset, columns)
    classes = getattr(dataset, "classes", None)  # of torchvision, whose rows are pairs
    if isinstance(classes, list | tuple) and classes and all(isinstance(name, str) for name in classes):
        return "label", list(classes)
    return None, []


def are_numbers(names: Sequence[str]) -> bool:
    """Whether nobody has given names: LABEL_0, LABEL_1, ... or 0, 1, ..."""
    return all(name in (f"LABEL_{index}", str(index)) for index, name in enumerate(names))


def labels_of(dataset: Any, columns: Sequence[str]) -> tuple[str, Any] | None:
    """The column of labels and its values (n,) or (n, K), as an array or a list; None where images would have to be read."""
    if isinstance(dataset, Augmented):
        return labels_of(dataset.dataset, columns)
    if isinstance(dataset, Subset | Relabelled):
        found = labels_of(dataset.dataset, columns)
        if found is None:
            return None
        column, values = found
        if isinstance(dataset, Subset):
            return column, [values[index] for index in dataset.indices]
        rules = LabelRules(len(dataset.numbers))
        rules.check(values, column)
        rows: list[dict[str, Any]] = [{}] * len(values)
        own = rules.collated(values, column, rows).numpy()  # (n,)
        return column, np.where(own >= 0, np.asarray(dataset.numbers)[own.clip(0)], own)
    if isinstance(dataset, list):
        rows = [as_row(row) for row in dataset]
        name = next((name for name in columns if rows and name in rows[0]), None)
        return None if name is None else (name, [row.get(name) for row in rows])
    if hasattr(dataset, "targets") and hasattr(dataset, "classes"):  # of torchvision
        changed = getattr(dataset, "target_transform", None) is not None
        return None if changed else ("label", np.asarray(dataset.targets))
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "with_format"):
        return None
    name = next((name for name in columns if name in dataset.column_names), None)
    return None if name is None else (name, _as_array(dataset.with_format("arrow", columns=[name])[:].column(name)))


def _as_array(column: Any) -> Any:
    """A column of Arrow as an array (n,) or (n, K) of numbers, or else as a list."""
    import pyarrow as pa

    array = column.combine_chunks()
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    kind = array.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return array.to_numpy(zero_copy_only=False)
    if pa.types.is_list(kind) and array.null_count == 0 and len(array):
        inside, lengths = array.flatten(), np.diff(array.offsets.to_numpy())
        if len(set(lengths.tolist())) == 1 and (pa.types.is_integer(inside.type) or pa.types.is_floating(inside.type)):
            return inside.to_numpy(zero_copy_only=False).reshape(len(array), -1)
    return array.to_pylist()


def columns_of(dataset: Any) -> list[str] | None:
    """The columns of the rows; None for a stream that does not tell."""
    if isinstance(dataset, Relabelled | Augmented | Subset):
        return columns_of(dataset.dataset)
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping) and not is_transformed(dataset):
        return list(features)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not len(dataset):
        return None
    with suppress(Exception), seeded(0):  # whatever is wrong with the first row is told when it is its turn
        return list(as_row(dataset[0]))
    return None


def is_transformed(dataset: Any) -> bool:
    """Whether a data set's rows are made by the user's function when they are read."""
    if isinstance(dataset, Relabelled | Augmented | Subset):
        return is_transformed(dataset.dataset)
    form = getattr(dataset, "format", None)
    return isinstance(form, Mapping) and form.get("type") == "custom"
